"""Figures of what routing saves: prefill time beside bound and ideal, and bytes of KV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fluxc.cli.tables import size
from fluxc.plan import Plan
from fluxc.report.axes import doublings, frame, ticks, tokens
from fluxc.report.scene import Area, Dot, Figure, Line, Shape, Text, line
from fluxc.report.series import Look, legend, legend_rows

Length = dict[str, Any]
HEIGHT = 330
NAMES = {"forced": "routes forced", "chosen": "as the routers choose"}


def speed_figure(lengths: Sequence[Length], crossover: int | None, caption: str) -> Figure:
    """Speed-up of prefill over dense against length, each run beside its ideal (solid) and its bound (dashed)."""
    runs = {name: _run(lengths, name) for name in dict.fromkeys(run["name"] for x in lengths for run in x["routed"])}
    at = [x["length"] for x in lengths]
    most = max(run.get("bound") or run["speedup"] for found in runs.values() for _, run in found)
    colours = dict(zip(runs, ("fluxc", "static", "oracle"), strict=False))
    looks = [Look(name, colours[name], NAMES.get(name, name), joined=True) for name in runs]
    looks.append(Look("", "mute", "ideal (line), bound (dashed)"))
    top = 36 + 19 * legend_rows(looks)
    chart = frame((min(at) / 1.15, max(at) * 1.15), (0.8, max(1.2, most * 1.05)), HEIGHT, top, log_x=True)
    shapes: list[Shape] = legend(looks, 16)
    x_ticks = doublings(chart.x.low, chart.x.high) or at
    grid = chart.grid(
        x_ticks, ticks(0.8, chart.y.high), "tokens of the prompt", "times as fast as dense", tokens, "{:.1f}×".format
    )
    shapes += [*grid, line([chart.point(chart.x.low, 1), chart.point(chart.x.high, 1)], "dense", 1.4)]
    if crossover and chart.x.inside(crossover):
        shapes += _mark(chart.x(crossover), chart.y.start, chart.y.end, f"crossover {crossover}")
    for name, found in runs.items():
        shapes += _speeds(found, colours[name], chart.point)
    said = "; ".join(f"{name} {run['speedup']:.2f}x at {x} tokens" for name, f in runs.items() for x, run in f[-1:])
    return Figure("speed", "Prefill against dense", caption, f"Speed-up of prefill: {said}", HEIGHT, tuple(shapes))


def _run(lengths: Sequence[Length], name: str) -> list[tuple[int, dict[str, Any]]]:
    return [(x["length"], run) for x in lengths for run in x["routed"] if run["name"] == name]


def _speeds(found: list[tuple[int, dict[str, Any]]], colour: str, point: Callable[[float, float], Any]) -> list[Shape]:
    def along(key: str) -> list[Any]:
        return [point(x, run[key]) for x, run in found]

    # A run at one length has no line: its ideal and bound are short strokes beside the dot.
    def guide(key: str, dash: tuple[float, ...]) -> Line:
        points = along(key)
        if len(points) == 1:
            ((x, y),) = points
            points = [(x - 13, y), (x + 13, y)]
        return line(points, colour, 1.4, dash=dash, opacity=0.75)

    # Engines are timed from outside, without bound and ideal.
    known = all("ideal" in run for _, run in found)
    shapes: list[Shape] = [guide("bound", (2, 5)), guide("ideal", ())] if known else []
    if len(found) > 1:
        shapes.append(line(along("speedup"), colour, 2.4))
    for (x, run), (px, py) in zip(found, along("speedup"), strict=True):
        figures = f"{run['speedup']:.2f}x" + (f", ideal {run['ideal']:.2f}, bound {run['bound']:.2f}" if known else "")
        title = f"{x} tokens, Ω {run['sparse_ratio']:.2f}: {figures}"
        shapes.append(Dot(px, py, 5, colour, title))
    return shapes


def _mark(x: float, bottom: float, top: float, text: str) -> list[Shape]:
    return [Line(((x, bottom), (x, top)), "mute", 1, (3, 3)), Text(x + 5, top + 11, text, 11.5)]


def kv_figure(plan: Plan, full_share: float, caption: str) -> Figure:
    """Bytes of KV of one request against its length: dense, at the plan's Ω, and all sparse; from the plan alone."""
    longest = plan.model.context or 16 * max(layer.keys for layer in plan.layers)
    lengths = [longest * step / 32 for step in range(33)]
    layers = len(plan.layers)
    dense, sparse = ([plan.kv_bytes([full] * layers, int(x)) for x in lengths] for full in (True, False))
    ours = [full_share * d + (1 - full_share) * s for d, s in zip(dense, sparse, strict=True)]
    chart = frame((0, longest), (0, dense[-1] * 1.04), HEIGHT, 60)
    looks = [Look("", "dense", "dense", True), Look("", "fluxc", f"fluxc, Ω {1 - full_share:.2f}", True)]
    shapes: list[Shape] = legend([*looks, Look("", "sparse", "all sparse", True)], 16)
    shapes += chart.grid(
        [longest * at / 4 for at in range(5)],
        ticks(0, chart.y.high, 4),
        "tokens of the request",
        "KV cache",
        tokens,
        _short,
    )
    shapes.append(Area((*_along(chart.point, lengths, ours), chart.point(longest, 0), chart.point(0, 0)), "fluxc", 0.1))
    for values, colour in ((dense, "dense"), (sparse, "sparse"), (ours, "fluxc")):
        shapes.append(line(_along(chart.point, lengths, values), colour, 2.2))
    saved = 1 - ours[-1] / dense[-1]
    shapes.append(Text(chart.x.end, chart.y(ours[-1]) + 34, f"{saved:.0%} less", 13, "fluxc", "end", bold=True))
    alt = f"KV cache against length: {saved:.0%} less than dense at {longest} tokens"
    return Figure("kv", "Memory of one request", caption, alt, HEIGHT, tuple(shapes))


def _short(count: float) -> str:
    """Bytes for an axis: 300 MB."""
    return size(int(count)).replace(".0 ", " ")


def _along(point: Callable[[float, float], Any], xs: Sequence[float], ys: Sequence[float]) -> list[Any]:
    return [point(x, y) for x, y in zip(xs, ys, strict=True)]
