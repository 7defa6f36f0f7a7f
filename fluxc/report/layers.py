"""Figures over the layers of a model: who runs full for which task and prompt, and who needs to. They line up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxc.data import FAR, LOCAL, REASONING, RETRIEVAL, TEXT
from fluxc.report.scene import WIDTH, Figure, Rect, Shape, Text

Row = dict[str, Any]
LEFT = 118
RIGHT = WIDTH - 10
ORDER = {task: at for at, task in enumerate((*RETRIEVAL, *FAR, *TEXT, *LOCAL, *REASONING))}


def task_map(rows: Sequence[Row], layers: Sequence[int], caption: str) -> Figure:
    """Layer by task: the share of prompts on which the layer runs full. `rows` of one system."""
    tasks = _tasks(rows)
    shapes: list[Shape] = []
    for index, task in enumerate(tasks):
        found = [row["routes"] for row in rows if row["task"] == task]
        y = 10 + 24 * index
        shapes.append(Text(LEFT - 10, y + 15, task, anchor="end"))
        for at, layer in enumerate(layers):
            share = sum(routes[at] == "1" for routes in found) / len(found)
            title = f"{task}, layer {layer}: full on {share:.0%} of {len(found)} prompts"
            shapes += _cell(at, len(layers), y, 22, share, title)
    height = 10 + 24 * len(tasks) + 40
    shapes += _axis(layers, height - 30)
    alt = (
        f"Share of prompts on which each of {len(layers)} layers runs full attention, for the tasks {', '.join(tasks)}"
    )
    return Figure("routes-by-task", "Full attention by layer and task", caption, alt, height, tuple(shapes))


def prompt_map(rows: Sequence[Row], layers: Sequence[int], caption: str) -> Figure:
    """Layer by prompt: full cells are filled; prompts of a task stand together."""
    ordered = sorted(rows, key=lambda row: (ORDER.get(row["task"], len(ORDER)), row["task"], row["prompt"]))
    step = min(12.0, max(3.0, 420 / len(ordered)))
    shapes: list[Shape] = []
    y, before = 10.0, ""
    for row in ordered:
        if row["task"] != before:
            y += 6 if before else 0
            shapes.append(Text(LEFT - 10, y + max(step, 9), row["task"], 11.5, anchor="end"))
            before = row["task"]
        for at, layer in enumerate(layers):
            full = row["routes"][at] == "1"
            title = f"{row['task']}, prompt {row['prompt']}, layer {layer}: {'full' if full else 'sparse'}"
            shapes += _cell(at, len(layers), y, step - 0.8, float(full), title)
        y += step
    height = y + 44
    shapes += _axis(layers, height - 30)
    alt = f"Routes of {len(ordered)} prompts, one row each: which of {len(layers)} layers run full attention"
    return Figure("routes-by-prompt", "Every prompt has routes of its own", caption, alt, height, tuple(shapes))


def need_bars(needs: Sequence[float], layers: Sequence[int], caption: str) -> Figure:
    """Mean need of each layer for full attention, in nats of answer loss."""
    top, bottom = 34.0, 190.0
    most = max([*needs, 1e-9])
    shapes: list[Shape] = [Text(LEFT, 16, "nats of answer loss that sparse attention costs in this layer")]
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        shapes += [Rect(LEFT, y, RIGHT - LEFT, 1, "grid"), Text(LEFT - 10, y + 4, f"{share * most:.2g}", anchor="end")]
    width = (RIGHT - LEFT) / len(layers)
    for at, (layer, need) in enumerate(zip(layers, needs, strict=True)):
        height = max(0.0, need) / most * (bottom - top)
        place = (LEFT + at * width + width * 0.14, bottom - max(height, 1.5), width * 0.72, max(height, 1.5))
        shapes.append(Rect(*place, "need", radius=2, title=f"layer {layer}: {need:.3g} nats"))
    shapes += _axis(layers, bottom + 12)
    ranked = sorted(zip(needs, layers, strict=True), reverse=True)[:3]
    alt = "Need of each layer for full attention; largest in layers " + ", ".join(str(layer) for _, layer in ranked)
    return Figure("need", "What each layer needs", caption, alt, bottom + 42, tuple(shapes))


def _tasks(rows: Sequence[Row]) -> list[str]:
    return sorted({row["task"] for row in rows}, key=lambda task: (ORDER.get(task, len(ORDER)), task))


def _cell(at: int, layers: int, y: float, height: float, share: float, title: str) -> list[Shape]:
    width = (RIGHT - LEFT) / layers
    gap = min(1.5, width * 0.15)
    place = (LEFT + at * width, y, width - gap, height)
    radius = 2.5 if height > 14 else 0
    under = Rect(*place, "grid", 0.55, radius, title)
    return [under, Rect(*place, "fluxc", share, radius, title)] if share else [under]


def _axis(layers: Sequence[int], y: float) -> list[Shape]:
    width = (RIGHT - LEFT) / len(layers)
    every = 1 if len(layers) <= 16 else 5
    marks: list[Shape] = [
        Text(LEFT + (at + 0.5) * width, y + 6, str(layer), 11.5, anchor="middle")
        for at, layer in enumerate(layers)
        if layer % every == 0
    ]
    return [*marks, Text(LEFT - 10, y + 6, "layer", 11.5, anchor="end")]
