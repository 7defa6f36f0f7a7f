"""`python -m fluxc` is `fluxc`."""

from __future__ import annotations

import sys
from pathlib import Path


def _leave_checkout() -> None:
    """`python -m` puts the current folder first in the path; our `kernels/` there hides Hugging Face's."""
    root = Path(__file__).resolve().parent.parent
    if (root / "kernels" / "schemas.py").exists():
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]


if __name__ == "__main__":
    _leave_checkout()
    from fluxc.cli import main

    sys.exit(main())
