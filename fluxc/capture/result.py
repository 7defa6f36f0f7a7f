"""What a capture is: a program in normal form, what is known of its source, and the tokenizer's files."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from fluxc.archive import load_program, save_program
from fluxc.errors import ArchiveError

META = "fluxc.json"
TOKENIZER = "tokenizer/"


@dataclasses.dataclass(frozen=True)
class Capture:
    """A captured model.

    `program`: inputs CAPTURED_INPUTS, output logits [B,N,V]. `meta`: source, family, context (tokens), vocab, layers,
    dtype, eos_ids, self_check and versions. `tokenizer_files`: file name to content, empty where there is none.
    """

    program: ExportedProgram
    meta: dict[str, Any]
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write one `.pt` file; raises OutputExistsError and StorageError, and then leaves nothing behind."""
        files: dict[str, str | bytes] = {TOKENIZER + name: data for name, data in self.tokenizer_files.items()}
        save_program(self.program, path, extra={META: json.dumps(self.meta, indent=2), **files}, force=force)


def load_capture(path: str | os.PathLike[str]) -> Capture:
    """Read what `Capture.save` wrote; raises ArchiveError for a damaged or hostile file, or one fluxc did not write."""
    program, extra = load_program(path)
    if META not in extra:
        raise ArchiveError(f"{path} was not captured by fluxc", hint="`fluxc capture` it first")
    tokenizer = {
        name.removeprefix(TOKENIZER): _bytes(data) for name, data in extra.items() if name.startswith(TOKENIZER)
    }
    return Capture(program, _meta(extra[META], path), tokenizer)


def files_of_tokenizer(tokenizer: Any) -> dict[str, bytes]:
    """The files a transformers tokenizer saves itself as; {} for None."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def _bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data


def _meta(text: str | bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise ArchiveError(f"{path}: {META} is not JSON", hint="capture the model again") from error
    if not isinstance(meta, dict):
        raise ArchiveError(f"{path}: {META} is no object", hint="capture the model again")
    return meta
