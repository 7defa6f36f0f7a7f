"""Results on disk: `NAME.eval.json` beside the model, the same rows as CSV, and the samples of an unfinished run."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fluxc.atomic import atomic_file
from fluxc.errors import DataError
from fluxc.evaluate.evaluation import FORMAT

SUFFIX = ".eval.json"
SAMPLES = ".samples"
_SAMPLE = ("loss", "exact", "routes", "key")
_COLUMNS = (
    *("suite", "task", "prompt", "length", "tokens", "system", "budget", "decode", "loss", "exact", "agree"),
    *("fresh", "answer_tokens", "kv_bytes", "routes"),
)


def default_output(model: str | Path) -> Path:
    """`NAME.eval.json` beside a folder or file, in the working directory for a hub id."""
    path = Path(model)
    stem = path.stem if path.suffix in (".flux", ".pt", ".pt2", ".gguf") else path.name
    return (path.absolute().parent if path.exists() else Path.cwd()) / f"{stem}{SUFFIX}"


def samples_folder(output: Path) -> Path:
    """Where a run that writes `output` keeps its samples until it is done."""
    return output.with_name(output.name + SAMPLES)


def write(output: Path, result: dict[str, Any]) -> None:
    """Replace `output`; raises StorageError."""
    with atomic_file(output, force=True) as temporary:
        temporary.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A result; raises DataError for a file that is none, or of a newer format."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror}", hint="`fluxc eval` writes one") from cause
    except ValueError as cause:
        raise DataError(f"{path} is no JSON", hint="`fluxc eval` writes one") from cause
    if not isinstance(found, dict) or found.get("format") != FORMAT or "rows" not in found:
        raise DataError(f"{path} is no result of `fluxc eval` of format {FORMAT}", hint="run `fluxc eval` again")
    return found


def known_samples(output: Path) -> dict[str, Any]:
    """Samples of an earlier result at `output` by key; {} where there is none that can be read."""
    try:
        found = read(output)
    except DataError:
        return {}
    scored = {row["key"]: {name: row[name] for name in _SAMPLE} for row in found["rows"] if "key" in row}
    return scored | found.get("kept", {})


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV, one a prompt and system; columns that no row has are left out."""
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
