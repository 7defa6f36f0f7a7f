"""What `fluxc eval` shows: one table a suite, and for suites of several tasks one line a system by task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fluxc.cli.tables import size, table

if TYPE_CHECKING:
    from rich.table import Table

Entry = dict[str, Any]


def suite_tables(result: dict[str, Any]) -> list[Table | str]:
    """Tables of all suites, with their titles."""
    shown: list[Table | str] = []
    for name, suite in result["suites"].items():
        entries = [entry for entry in result["summary"] if entry["suite"] == name]
        lengths = ", ".join(map(str, suite["lengths"]))
        shown.append(f"[bold]{name}[/]: {suite['prompts']} prompts" + (f" of {lengths} tokens" if lengths else ""))
        if entries:
            shown.append(_systems([entry for entry in entries if entry["scope"] == "all"]))
            shown += _by_task(entries, suite["tasks"])
        else:
            shown.append(_long([row for row in result["rows"] if row["suite"] == name]))
    return shown


def _systems(entries: list[Entry]) -> Table:
    asked = any(entry["exact"] for entry in entries)
    head = ["system", "Ω asked", "Ω", *(["exact match", "less dense"] if asked else []), "perplexity / dense", "loss"]
    made = table(*head, numbers=head[1:])
    for entry in entries:
        budget, ratio = entry["budget"], entry["sparse_ratio"]
        cells = [
            entry["system"],
            "" if budget is None else f"{1 - budget:.2f}",
            "" if ratio is None else f"{ratio:.3f}",
        ]
        if asked:
            exact, less = entry["exact"], entry["exact_less_dense"]
            cells += [_interval(exact, 2), "" if entry["system"] == "dense" else _interval(less, 2, sign=True)]
        made.add_row(*cells, _interval(entry["perplexity_over_dense"], 3), f"{entry['loss']:.3f}")
    return made


def _by_task(entries: list[Entry], tasks: list[str]) -> list[Table | str]:
    if len(tasks) < 2:
        return []
    head = ["system", *tasks]
    made = table(*head, numbers=tasks)
    systems = dict.fromkeys(entry["system"] for entry in entries)
    found = {(entry["system"], entry["scope"]): entry for entry in entries}
    for system in systems:
        made.add_row(system, *(_cell(found[system, task]) for task in tasks))
    void = [task for task in tasks if not found["dense", task]["counts"]]
    note = f"* does not count: all-sparse reaches a fifth of dense, or dense fails ({', '.join(void)})"
    return [made, *([note] if void else [])]


def _cell(entry: Entry) -> str:
    mark = "" if entry["counts"] else "*"
    if entry["exact"]:
        return f"{entry['exact'][0]:.2f}{mark}"
    return f"{entry['perplexity_over_dense'][0]:.3f}"


def _long(rows: list[Entry]) -> Table:
    head = ("system", "decode", "Ω", "agrees with dense", "perplexity under dense", "fresh 4-grams", "KV")
    made = table(*head, numbers=head[2:])
    for system, decode in dict.fromkeys((row["system"], row["decode"]) for row in rows):
        found = [row for row in rows if (row["system"], row["decode"]) == (system, decode)]
        ratio = _mean([row["routes"].count("0") / len(row["routes"]) for row in found])
        numbers = [_mean([row[key] for row in found]) for key in ("agree", "loss", "fresh", "kv_bytes")]
        agree, loss, fresh, held = numbers
        cells = (f"{ratio:.2f}", f"{agree:.2f}", f"{math.exp(loss):.2f}", f"{fresh:.2f}", size(int(held)))
        made.add_row(system, "either" if system == "dense" else decode, *cells)
    return made


def _interval(values: list[float] | None, digits: int, sign: bool = False) -> str:
    if values is None:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


def _share(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
