"""Rows of `fluxc.bench.shape` for people."""

from __future__ import annotations

from typing import Any

from fluxc.bench.shape_rows import Row
from fluxc.cli.tables import size, table


def shown(row: Row) -> list[Any]:
    """A heading and, for most sections, a table."""
    head = f"{row['name']} ({row['took']:.0f} s, at {row['at']:.0f} s)"
    notes = [f"  {row[key]}" for key in ("note", "error") if row.get(key)]
    make = {"prefill": _prefill, "decode": _decode, "crossover": _crossover}.get(row["section"], _plain)
    return [head, *notes, *make(row)]


def _plain(row: Row) -> list[Any]:
    hidden = ("section", "name", "at", "took", "error", "note", "trace", "routes", "clocks")
    said = [f"{key} {_text(value)}" for key, value in row.items() if key not in hidden]
    return ["  " + ", ".join(said)] if said else []


def _prefill(row: Row) -> list[Any]:
    if "dense" not in row:
        return []
    head = ("Ω", "seconds", "speed-up", "bound", "of bound", "ideal", "of ideal", "KV", "runs", "peak")
    made = table(*head, numbers=head)
    dense = row["runs"]["dense"]
    share = f"attention {row['attention'] / row['dense']:.0%}"
    made.add_row("dense", f"{row['dense']:.4f}", share, *[""] * 4, size(dense[0]["kv_bytes"]), str(len(dense)),
                 _peak(dense))  # fmt: skip
    for run in sorted(row["routed"], key=_ratio):
        numbers = [f"{run[key]:.3f}" for key in ("speedup", "bound", "of_bound", "ideal", "of_ideal")]
        taken = row["runs"][run["name"]]
        made.add_row(f"{run['sparse_ratio']:.3f}", f"{run['seconds']['median']:.4f}", *numbers, size(run["kv_bytes"]),
                     str(len(taken)), _peak(taken))  # fmt: skip
    return [made]


def _peak(runs: list[Row]) -> str:
    return size(max(run["peak_bytes"] for run in runs))


def _decode(row: Row) -> list[Any]:
    head = ("Ω", "batch", "step ms", "device ms", "host ms", "speed-up", "bound", "of bound", "device of bound", "KV")
    made = table(*head, numbers=head)
    if "dense" in row:
        dense = row["dense"]
        share = f"attention {1000 * dense['attention']:.3f}"
        made.add_row("dense", str(row["batch"]), *_steps(dense), share, "", "", "", size(dense["kv_bytes"]))
    for run in sorted(row.get("routed", []), key=_ratio):
        limits = [f"{run[key]:.3f}" for key in ("speedup", "bound", "of_bound", "device_of_bound")]
        made.add_row(f"{run['sparse_ratio']:.3f}", str(row["batch"]), *_steps(run), *limits, size(run["kv_bytes"]))
    for run in sorted(row.get("larger", []), key=_ratio):
        made.add_row(f"{run['sparse_ratio']:.3f}", str(run["batch"]), *_steps(run), *[""] * 4, size(run["kv_bytes"]))
    return [made] if made.row_count else []


def _steps(run: Row) -> list[str]:
    return [f"{1000 * seconds:.3f}" for seconds in (run["step"]["median"], run["device"], run["host"])]


def _crossover(row: Row) -> list[Any]:
    if "served" not in row:
        return []
    made = table("tokens", "dense ms", "served", "ms", "over dense", numbers=("tokens", "dense ms", "ms", "over dense"))
    for run in row["served"]:
        times = [f"{1000 * run[key]['median']:.2f}" for key in ("dense", "seconds")]
        made.add_row(str(run["length"]), times[0], run["runs"], times[1], f"{run['over_dense']:+.1%}")
    return [f"  crossover at Ω {row['sparse_ratio']:g}: {row['crossover']} tokens", made]


def _text(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.5f}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _ratio(run: Row) -> float:
    return float(run["sparse_ratio"])
