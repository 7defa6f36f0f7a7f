"""Tables of `fluxc bench`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fluxc.cli.tables import size, table

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.bench.compare import Pair

COLUMNS = {
    "ms": "ms",
    "tflops": "TFLOP/s",
    "tbps": "TB/s",
    "speedup": "x dense",
    "of_ideal": "of ideal",
    "of_dense": "of dense",
    "host_us": "host us",
    "error": "error",
}


def kernel_tables(rows: Iterable[dict[str, Any]]) -> list[Table]:
    """One table a suite of ops."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        suites.setdefault(row["suite"], []).append(row)
    return [_kernels(found) for found in suites.values()]


def _kernels(rows: list[dict[str, Any]]) -> Table:
    shown = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    made = table("op", "by", "length", "shape", *(COLUMNS[name] for name in shown))
    for row in rows:
        cells = ("-" if row.get(name) is None else f"{row[name]:.4g}" for name in shown)
        made.add_row(row["op"], row["by"], str(row["length"]), row["shape"], *cells)
    return made


def model_tables(result: dict[str, Any]) -> list[Table | str]:
    """Prefill, decode, and the figures of one number."""
    return [_prefill(result["lengths"]), _decode(result["decode"]), _rest(result)]


def _prefill(lengths: list[dict[str, Any]]) -> Table:
    head = ("prefill", "routes", "Ω", "dense s", "seconds", "spread", "speed-up", "ideal", "bound", "of ideal")
    made = table(*head, numbers=head[2:])
    for length in lengths:
        dense = length["dense"]["median"]
        for index, run in enumerate(length["routed"]):
            first = (f"{length['length']} tokens", run["name"]) if not index else ("", run["name"])
            cells = (f"{run['sparse_ratio']:.2f}", f"{dense:.3f}", f"{run['seconds']['median']:.3f}")
            figures = (run.get(name) for name in ("speedup", "ideal", "bound", "of_ideal"))
            made.add_row(*first, *cells, _spread(run["seconds"]), *("" if f is None else f"{f:.3f}" for f in figures))
    return made


def _decode(found: list[dict[str, Any]]) -> Table:
    head = ("decode after", "batch", "Ω", "dense ms", "ms a step", "spread", "speed-up", "KV dense", "KV")
    made = table(*head, numbers=head[1:])
    for x in found:
        dense, forced = x["dense"], x["forced"]
        made.add_row(
            f"{x['length']} tokens",
            str(x["batch"]),
            f"{forced['sparse_ratio']:.2f}",
            f"{1000 * dense['median']:.1f}",
            f"{1000 * forced['median']:.1f}",
            _spread(forced),
            f"{forced['speedup']:.3f}",
            size(dense["kv_bytes"]),
            size(forced["kv_bytes"]),
        )
    return made


def _rest(result: dict[str, Any]) -> str:
    said = [f"loaded in {result['load_seconds']:.1f} s, ready in {result['prepare_seconds']:.1f} s more"]
    said.append(f"peak memory {size(result['peak_bytes'])}")
    if "crossover" in result:
        said.append(f"crossover {result['crossover']} tokens")
    if "router_seconds" in result:
        said.append(f"a router {1e6 * result['router_seconds']:.0f} us at {result['router_length']} tokens")
    return "; ".join(said)


def _spread(seconds: dict[str, Any]) -> str:
    return f"{(seconds['slowest'] - seconds['fastest']) / seconds['median']:.0%}"


def comparison(pairs: list[Pair]) -> Table:
    """Both medians of each measurement, and how many times as fast the second is."""
    head = ("measured", "first ms", "second ms", "times as fast", "")
    made = table(*head, numbers=head[1:4])
    for pair in pairs:
        times = (f"{1000 * pair.first:.2f}", f"{1000 * pair.second:.2f}", f"{pair.ratio:.3f}")
        made.add_row(pair.name, *times, "" if pair.apart else "within the spread")
    return made
