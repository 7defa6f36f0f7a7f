"""What a report is made of: the folder's plan and measurements, and what `fluxc eval` and `fluxc bench` stored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fluxc.errors import DataError
from fluxc.evaluate import results
from fluxc.evaluate.summary import summaries
from fluxc.flux_dir import open_flux
from fluxc.plan import Plan

BENCH = ".bench.json"


@dataclasses.dataclass(frozen=True)
class Material:
    """`evaluation` and `bench` are None where nothing is stored; `calibration` is what `fluxc transform` measured."""

    path: Path
    plan: Plan
    meta: dict[str, Any]
    calibration: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    bench: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The model's name: that of its source, without folder and suffix."""
        source = str(self.meta.get("source", self.path.stem)).rstrip("/").rsplit("/", 1)[-1]
        return source.removesuffix(".gguf")

    @property
    def layers(self) -> list[int]:
        """Indices of the routable layers in graph order."""
        return [layer.layer for layer in self.plan.layers]


def gather(flux: str | Path, evaluation: Path | None = None, bench: Path | None = None) -> Material:
    """Read everything; results that are not named are looked for beside the folder and in the working directory.

    Raises what `open_flux` raises, and DataError for a named result that cannot be read.
    """
    found = open_flux(flux, verify_weights=False)
    measured = found.path / "measurements" / "calibration.json"
    calibration = json.loads(measured.read_text()) if measured.is_file() else None
    evaluated, benched = (
        named or _beside(found.path, ending) for named, ending in ((evaluation, results.SUFFIX), (bench, BENCH))
    )
    return Material(
        path=found.path,
        plan=found.plan,
        meta=found.meta,
        calibration=calibration,
        evaluation=read_evaluation(evaluated) if evaluated else None,
        bench=read_bench(benched) if benched else None,
    )


def _beside(folder: Path, ending: str) -> Path | None:
    name = folder.absolute().stem + ending
    return next((place / name for place in (folder.absolute().parent, Path.cwd()) if (place / name).is_file()), None)


def read_evaluation(path: Path) -> dict[str, Any]:
    """A result of `fluxc eval`, or of the quality benchmark, in the form of the first. Raises DataError."""
    values = _json(path)
    if isinstance(values, dict) and "rows" not in values and isinstance(values.get("suites"), dict):
        return _of_quality(values)
    return results.read(path)


def _of_quality(values: dict[str, Any]) -> dict[str, Any]:
    """The rows of `fluxc.bench.quality` as those of an evaluation: the budget is in the system's name."""
    rows = [
        {**row, "suite": name, "length": row["tokens"], "budget": _budget(row["system"])}
        for name, found in values["suites"].items()
        for row in found
    ]
    conditions = values["conditions"]
    # Lengths differ by a token from prompt to prompt there: no cells by length.
    whole = [{**row, "length": 0} for row in rows]
    suites = {
        name: {
            "tasks": sorted({row["task"] for row in found}),
            "lengths": [],
            "prompts": len({row["prompt"] for row in found}),
            "rule": "",
        }
        for name, found in values["suites"].items()
    }
    summary = summaries(whole, 2 * (conditions["sink"] + conditions["window"]))
    return {"conditions": conditions, "suites": suites, "rows": rows, "summary": summary}


def _budget(system: str) -> float | None:
    last = system.rsplit(" ", 1)[-1]
    return float(last) if last.replace(".", "", 1).isdigit() else None


def read_bench(path: Path) -> dict[str, Any]:
    """A result of `fluxc bench` or of the prefill benchmark; raises DataError."""
    values = _json(path)
    lengths = values.get("lengths") if isinstance(values, dict) else None
    if not isinstance(lengths, list) or not all("routed" in x and "dense" in x for x in lengths):
        raise DataError(f"{path} holds no prefill times", hint="`fluxc bench model.flux` writes them")
    return dict(values)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror}", hint="name a stored result") from cause
    except ValueError as cause:
        raise DataError(f"{path} is no JSON", hint="name a stored result") from cause
