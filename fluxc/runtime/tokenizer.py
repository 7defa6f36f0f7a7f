"""The tokenizer that a directory keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxc.errors import DataError


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer whose files `folder` holds; raises DataError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as cause:
        raise DataError(f"{folder} holds no tokenizer", hint="give token ids") from cause
