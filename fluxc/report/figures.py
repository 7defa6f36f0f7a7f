"""All figures of a report, in the order of the page."""

from __future__ import annotations

import math

from fluxc.data import group_of
from fluxc.report.accuracy import exact_figure, perplexity_figure
from fluxc.report.cost import kv_figure, speed_figure
from fluxc.report.findings import entries_of, mean_full_share, plan_rows, shown_budget, takeaway
from fluxc.report.layers import need_bars, prompt_map, task_map
from fluxc.report.material import Material
from fluxc.report.scene import Figure


def accuracy_figures(material: Material) -> list[Figure]:
    """One or two figures a suite: exact match where something is asked, perplexity where text is scored."""
    evaluation, budget = material.evaluation, shown_budget(material)
    if evaluation is None or budget is None:
        return []
    made = []
    for suite, described in evaluation["suites"].items():
        entries = entries_of(evaluation, suite)
        if not entries:
            continue
        said = takeaway(entries, budget)
        if any(entry["exact"] for entry in entries):
            made.append(exact_figure(suite, entries, said))
        if any(group_of(task) in ("text", "user") for task in described["tasks"]):
            made.append(perplexity_figure(suite, entries, said))
    return made


def route_figures(material: Material) -> list[Figure]:
    """Which layers run full, and what they need; the tall one is second, beside the others on a wide page."""
    made, layers = [], material.layers
    evaluation, budget = material.evaluation, shown_budget(material)
    if evaluation is not None and budget is not None:
        rows = plan_rows(evaluation, budget)
        made.append(
            task_map(rows, layers, f"Budget {budget:g}. The stronger the colour, the more prompts run it full.")
        )
        said = f"Budget {budget:g}, one row a prompt: filled is full attention, empty is sparse."
        made.append(prompt_map(rows, layers, said))
    if material.calibration:
        needs = material.calibration["needs"]
        mean = [math.fsum(row[at] for row in needs) / len(needs) for at in range(len(layers))]
        made.append(
            need_bars(mean, layers, f"Mean over the {len(needs)} prompts that calibration measured, first order.")
        )
    return made


def cost_figures(material: Material) -> list[Figure]:
    """Time and memory."""
    made = []
    if material.bench:
        device = material.bench.get("conditions", {}).get("device", "")
        said = (
            f"Medians of runs side by side in one process, {device}. Ideal: sparse attention costs its share of keys."
        )
        made.append(speed_figure(material.bench["lengths"], material.bench.get("crossover"), said))
    said = f"Planned bytes; decode: {material.plan.decode}. Sparse layers keep a ring of sink and window."
    return [*made, kv_figure(material.plan, mean_full_share(material), said)]


def all_figures(material: Material) -> list[Figure]:
    """Every figure that the material has data for."""
    return [*accuracy_figures(material), *route_figures(material), *cost_figures(material)]
