"""Two stored benchmarks side by side: what got faster, and whether by more than the runs scatter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fluxc.errors import DataError


@dataclasses.dataclass(frozen=True)
class Pair:
    """One measurement of both. seconds: medians; `apart`: the ranges of their runs do not overlap."""

    name: str
    first: float
    second: float
    apart: bool

    @property
    def ratio(self) -> float:
        """How many times as fast the second is."""
        return self.first / self.second


@dataclasses.dataclass(frozen=True)
class _Time:
    median: float
    fastest: float
    slowest: float


def compare(first: Path, second: Path) -> list[Pair]:
    """What both files measured, in the order of the first. Raises DataError for files that share nothing."""
    mine, other = (dict(_times(_read(path))) for path in (first, second))
    found = [_pair(name, mine[name], other[name]) for name in mine if name in other]
    if not found:
        raise DataError(f"{first} and {second} measured nothing in common", hint="compare runs of the same command")
    return found


def _pair(name: str, a: _Time, b: _Time) -> Pair:
    return Pair(name, a.median, b.median, a.slowest < b.fastest or b.slowest < a.fastest)


def _times(result: dict[str, Any]) -> Iterator[tuple[str, _Time]]:
    for x in result.get("lengths", []):
        yield f"prefill {x['length']} dense", _time(x["dense"])
        for run in x["routed"]:
            yield f"prefill {x['length']} {run['name']}", _time(run["seconds"])
    for x in result.get("decode", []):
        for name in ("dense", "forced"):
            yield f"decode {x['length']} batch {x['batch']} {name}", _time(x[name])
    for row in result.get("rows", []):
        if row.get("ms"):
            seconds = row["ms"] / 1000
            spread = row.get("spread") or [row["ms"], row["ms"]]
            low, high = (value / 1000 for value in spread) if isinstance(spread, list) else (seconds, seconds)
            yield f"{row['op']} {row['by']} {row['length']} {row['shape']}", _Time(seconds, low, high)


def _time(values: dict[str, Any]) -> _Time:
    return _Time(values["median"], values["fastest"], values["slowest"])


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror}", hint="name two results of `fluxc bench`") from cause
    except ValueError as cause:
        raise DataError(f"{path} is no JSON", hint="name two results of `fluxc bench`") from cause
    if not isinstance(found, dict):
        raise DataError(f"{path} is no result of `fluxc bench`")
    return found
