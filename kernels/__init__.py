"""The ops of fluxc: one folder per op (`reference.py`, `op.py`, later `triton_impl.py`), schemas in `schemas.py`.

`register()` defines the ops in the `fluxc` namespace of torch. It is idempotent, and is called by everything that
captures, loads or runs a program; importing this package alone does not import torch.
"""

from __future__ import annotations

from fluxc.kernels.density import density

__all__ = ["density", "register"]


def register() -> None:
    """Define all ops that have an implementation as `torch.ops.fluxc.*`. Does nothing the second time."""
    from fluxc.kernels import registry

    registry.register()
