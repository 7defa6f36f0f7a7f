"""The numbers a report leads with, read off the summaries, and the plan in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from fluxc.bench.systems import plan_name
from fluxc.plan import Plan
from fluxc.report.material import Material

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number with what it means."""

    value: str
    meaning: str


def shown_budget(material: Material) -> float | None:
    """The evaluated budget nearest to the plan's, None where nothing was evaluated."""
    if material.evaluation is None:
        return None
    budgets = {e["budget"] for e in material.evaluation["summary"] if e["system"].startswith("fluxc ")}
    return min(budgets, key=lambda budget: abs(budget - material.plan.budget), default=None)


def entries_of(evaluation: dict[str, Any], suite: str, scope: str = "all") -> list[Entry]:
    """The summaries of one suite and scope, one a system."""
    return [e for e in evaluation["summary"] if (e["suite"], e["scope"]) == (suite, scope)]


def tiles(material: Material) -> list[Tile]:
    """What the reader should see first; only what was measured, or follows from the plan."""
    found = _evaluated(material) if material.evaluation else []
    if material.bench:
        found += _speed(material.bench)
    longest = material.plan.model.context
    if longest:
        share = mean_full_share(material)
        layers = len(material.plan.layers)
        dense, sparse = (material.plan.kv_bytes([full] * layers, longest) for full in (True, False))
        saved = 1 - (share * dense + (1 - share) * sparse) / dense
        found.append(Tile(f"−{saved:.0%}", f"KV cache of a request of {longest:,} tokens, by the plan"))
    return found


def _evaluated(material: Material) -> list[Tile]:
    evaluation, budget = material.evaluation, shown_budget(material)
    if evaluation is None or budget is None:
        return []
    found: list[Tile] = []
    for suite in evaluation["suites"]:
        by_name = {entry["system"]: entry for entry in entries_of(evaluation, suite)}
        ours, dense = by_name.get(plan_name(budget)), by_name.get("dense")
        if ours is None or dense is None:
            continue
        at = "" if ours["sparse_ratio"] is None else f", Ω {ours['sparse_ratio']:.2f}"
        if ours["exact"] and dense["exact"][0] > 0:
            kept = ours["exact"][0] / dense["exact"][0]
            of_dense = f"{ours['exact'][0]:.2f} of {dense['exact'][0]:.2f}, {ours['prompts']} prompts"
            said = f"of dense's exact answers on {suite} ({of_dense}){at}"
            found.append(Tile(f"{kept:.0%}", said))
        if suite in ("text", "mixed"):
            ratio = ours["perplexity_over_dense"]
            found.append(
                Tile(f"×{ratio[0]:.3f}", f"perplexity over dense on {suite} [{ratio[1]:.3f}, {ratio[2]:.3f}]{at}")
            )
    return found[:4]


def _speed(bench: dict[str, Any]) -> list[Tile]:
    longest = max(bench["lengths"], key=lambda x: x["length"])
    run = longest["routed"][-1]
    ideal = f", ideal {run['ideal']:.2f}×" if "ideal" in run else ""
    said = f"prefill of {longest['length']:,} tokens{ideal}, Ω {run['sparse_ratio']:.2f}"
    return [Tile(f"{run['speedup']:.2f}×", said)]


def mean_full_share(material: Material) -> float:
    """Share of layers that run full at the plan's budget: as evaluated, else as verified, else as asked."""
    budget = shown_budget(material)
    if material.evaluation is not None and budget is not None:
        rows = plan_rows(material.evaluation, budget)
        return math.fsum(row["routes"].count("1") / len(row["routes"]) for row in rows) / len(rows)
    return float(material.plan.achieved_at().get("full_share", material.plan.budget))


def plan_rows(evaluation: dict[str, Any], budget: float) -> list[dict[str, Any]]:
    """The rows of the plan at a budget on the suite that shows most tasks."""
    name = plan_name(budget)
    by_suite: dict[str, list[dict[str, Any]]] = {}
    for row in evaluation["rows"]:
        if row["system"] == name and row["routes"]:
            by_suite.setdefault(row["suite"], []).append(row)
    everything = max(by_suite.values(), key=lambda rows: len({row["task"] for row in rows}))
    tasks = {row["task"] for row in everything}
    # Tasks that the widest suite does not ask come from the others.
    return everything + [
        r for rows in by_suite.values() if rows is not everything for r in rows if r["task"] not in tasks
    ]


def takeaway(entries: Sequence[Entry], budget: float) -> str:
    """One sentence that compares the plan with the best static choice and with dense, whoever is ahead."""
    by_name = {entry["system"]: entry for entry in entries}
    ours = by_name.get(plan_name(budget))
    if ours is None or ours["sparse_ratio"] is None:
        return ""
    statics = [e for e in entries if "static" in e["system"] and e["budget"] == budget]
    said = f"At budget {budget:g} fluxc has {_score(ours)}"
    if statics:
        best = min(statics, key=lambda e: e["loss"])
        said += f"; {best['system'].rsplit(' ', 1)[0]}, {_score(best)}"
    return f"{said}. {ours['prompts']} prompts, 95 % intervals."


def _score(entry: Entry) -> str:
    ratio = f"perplexity ×{entry['perplexity_over_dense'][0]:.3f} at Ω {entry['sparse_ratio']:.2f}"
    return f"{entry['exact'][0]:.2f} exact and {ratio}" if entry["exact"] else ratio


def in_words(material: Material) -> list[str]:
    """The plan as sentences."""
    plan = material.plan
    said = [_kinds(plan), _budgets(plan)]
    budget = shown_budget(material)
    if material.evaluation is not None and budget is not None:
        said.append(_layers(plan_rows(material.evaluation, budget), material.layers))
    return [*said, _origin(plan)]


def _kinds(plan: Plan) -> str:
    layer, layers = plan.layers[0], len(plan.layers)
    own = plan.model.layers - layers
    first = f"{layers} attention layers have a router each" + (
        f"; {own} more have a window of their own" if own else ""
    )
    sees = f"the first {layer.sink:,} tokens and the last {layer.window:,}"
    if layer.kind == "triangle":
        sees += f", and the last {layer.last} rows of the prompt see everything"
    if layer.kind == "block":
        sees = f"those blocks of {layer.block} keys that hold {layer.threshold:.0%} of the predicted attention"
    keeps = (
        "keeps every token" if plan.decode == "full" else f"keeps {layer.keys:,} tokens of KV, however long the request"
    )
    said = f"{first}. A layer that goes sparse ({layer.kind}) sees {sees}; it {keeps}."
    if layer.full_kind == "block":
        blocks = f"blocks of {layer.block} keys that hold {layer.threshold:.0%} of the predicted attention"
        said += f" Where a layer runs full, the prompt reads those {blocks}."
    return said


def _budgets(plan: Plan) -> str:
    said = f"Budget {plan.budget:g}: on average at most {plan.budget:.0%} of them run full, Ω {1 - plan.budget:.2f}."
    shown = plan.achieved_at()
    if "full_share" in shown:
        said += f" On {shown['prompts']} held-out prompts {shown['full_share']:.0%} did."
    return f"{said} Every other budget from {plan.curve[0].budget:g} to {plan.curve[-1].budget:g} is in the plan too."


def _layers(rows: Sequence[dict[str, Any]], layers: Sequence[int]) -> str:
    share = [sum(row["routes"][at] == "1" for row in rows) / len(rows) for at in range(len(layers))]
    full = [str(layer) for layer, s in zip(layers, share, strict=True) if s >= 0.95]
    sparse = [str(layer) for layer, s in zip(layers, share, strict=True) if s <= 0.05]
    open_ones = len(layers) - len(full) - len(sparse)
    return (
        f"On the {len(rows)} prompts shown, {_listed(full)} nearly always full, {_listed(sparse)} nearly always "
        f"sparse, and the routes of {open_ones} depend on the prompt."
    )


def _listed(layers: list[str]) -> str:
    if not layers:
        return "no layer was"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)} {'were' if len(layers) > 1 else 'was'}"


def _origin(plan: Plan) -> str:
    origin = plan.calibration
    if "prompts" not in origin:
        return ""
    counts = origin["prompts"]
    effort, price = origin.get("effort", "unknown"), origin.get("gives_up", "unknown")
    return (
        f"Calibrated with effort {effort} (it gives up: {price}) on {counts.get('measured', 0)} measured and "
        f"{counts.get('pooled', 0)} pooled prompts, {origin.get('origin', '')}, seed {origin.get('seed', '')}."
    )
