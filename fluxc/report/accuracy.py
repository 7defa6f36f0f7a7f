"""Accuracy against Ω: every system of a suite as a point with its interval, the plan's budgets joined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fluxc.report.axes import Frame, frame, ticks
from fluxc.report.scene import Anchor, Area, Dot, Figure, Line, Shape, Text, line
from fluxc.report.series import LOOKS, Look, legend, legend_rows, look_of

Entry = dict[str, Any]
HEIGHT = 330


def exact_figure(suite: str, entries: Sequence[Entry], caption: str) -> Figure:
    """Share answered exactly against Ω; entries of one scope, one a system."""
    shown = [entry for entry in entries if entry["exact"]]
    top = max(0.2, *(entry["exact"][2] for entry in shown))
    chart = _Chart(shown, "exact", (0.0, min(1.0, top * 1.06)), "{:.2f}".format, "answered exactly")
    best = _words(shown, "exact", "{:.2f}")
    return Figure(f"exact-{suite}", f"{suite}: exact match", caption, f"Exact match against Ω: {best}", *chart.drawn())


def perplexity_figure(suite: str, entries: Sequence[Entry], caption: str) -> Figure:
    """Perplexity over dense against Ω; what is far worse than the plan is named at the upper edge."""
    near = [e["perplexity_over_dense"] for e in entries if look_of(e["system"]).start in ("fluxc", "best static")]
    near = near or [e["perplexity_over_dense"] for e in entries if e["system"] != "dense"] or [[1.0, 1.0, 1.0]]
    high = max(1.04, max(values[2] for values in near) * 1.02)
    low = min(0.99, *(values[1] for values in near))
    chart = _Chart(
        entries, "perplexity_over_dense", (low, high), "{:.2f}".format, "perplexity / dense (less is better)"
    )
    best = _words(entries, "perplexity_over_dense", "{:.3f}")
    title = f"{suite}: perplexity over dense"
    return Figure(f"perplexity-{suite}", title, caption, f"Perplexity over dense against Ω: {best}", *chart.drawn())


def _words(entries: Sequence[Entry], key: str, form: str) -> str:
    known = (e for e in entries if e["sparse_ratio"] is not None)
    return "; ".join(f"{e['system']} {form.format(e[key][0])} at Ω {e['sparse_ratio']:.2f}" for e in known)


class _Chart:
    """Points of one suite on a frame."""

    def __init__(self, entries: Sequence[Entry], key: str, y: tuple[float, float], form: Any, label: str) -> None:
        self._entries = [entry for entry in entries if entry["sparse_ratio"] is not None]
        self._key, self._form, self._label = key, form, label
        present = {look_of(entry["system"]) for entry in self._entries}
        self._looks = [look for look in reversed(LOOKS) if look in present]
        self._looks += sorted(present - set(LOOKS), key=lambda look: look.start)
        self._rows = legend_rows(self._looks)
        self._height = HEIGHT + 19 * (self._rows - 1)
        self._frame: Frame = frame((-0.02, 1.02), y, self._height, 36 + 19 * self._rows)

    def drawn(self) -> tuple[float, tuple[Shape, ...]]:
        """Height and shapes of the figure."""
        y = self._frame.y
        shapes: list[Shape] = legend(self._looks[::-1], 16)
        y_ticks = ticks(y.low, y.high)
        shapes += self._frame.grid(
            [0, 0.2, 0.4, 0.6, 0.8, 1.0],
            y_ticks,
            "Ω, share of routable layers on sparse attention",
            self._label,
            "{:.1f}".format,
            self._form,
        )
        for look in self._looks:
            shapes += self._series(look)
        return self._height, tuple(shapes + self._beyond())

    def _series(self, look: Look) -> list[Shape]:
        found = sorted((e for e in self._entries if look_of(e["system"]) == look), key=lambda e: e["sparse_ratio"])
        kept = [entry for entry in found if self._frame.y.inside(entry[self._key][0])]
        points = [self._frame.point(entry["sparse_ratio"], entry[self._key][0]) for entry in kept]
        shapes: list[Shape] = []
        if look.joined and len(points) > 1:
            shapes += [*self._band(look, kept), line(points, look.colour, 2.2)]
        for entry, (x, y) in zip(kept, points, strict=True):
            shapes += [
                self._whisker(look, entry, x),
                Dot(x, y, 5 if look.start == "fluxc" else 4, look.colour, _title(entry, self._key)),
            ]
        return shapes

    def _band(self, look: Look, kept: list[Entry]) -> list[Shape]:
        if look.start != "fluxc":
            return []
        upper = [self._frame.point(e["sparse_ratio"], self._clamp(e[self._key][2])) for e in kept]
        lower = [self._frame.point(e["sparse_ratio"], self._clamp(e[self._key][1])) for e in reversed(kept)]
        return [Area((*upper, *lower), look.colour, 0.13)]

    def _whisker(self, look: Look, entry: Entry, x: float) -> Line:
        low, high = (self._frame.y(self._clamp(value)) for value in entry[self._key][1:])
        return Line(((x, low), (x, high)), look.colour, 1.2, opacity=0.55)

    def _clamp(self, value: float) -> float:
        return min(max(value, self._frame.y.low), self._frame.y.high)

    def _beyond(self) -> list[Shape]:
        """Systems above the frame: an arrow at the edge with the number."""
        shapes: list[Shape] = []
        edge = self._frame.y.end
        far = [entry for entry in self._entries if entry[self._key][0] > self._frame.y.high]
        for at, entry in enumerate(sorted(far, key=lambda e: e["sparse_ratio"])):
            x, colour = self._frame.x(entry["sparse_ratio"]), look_of(entry["system"]).colour
            shapes.append(
                Area(((x - 5, edge + 9), (x + 5, edge + 9), (x, edge)), colour, 1.0, _title(entry, self._key))
            )
            side: Anchor = "end" if entry["sparse_ratio"] > 0.8 else "start"
            shift = -10 if side == "end" else 10
            shapes.append(Text(x + shift, edge + 9 + 15 * (at % 2), f"{entry[self._key][0]:.1f}", 12, colour, side))
        return shapes


def _title(entry: Entry, key: str) -> str:
    mean, low, high = entry[key]
    digits = 3 if math.isfinite(mean) and mean >= 0.9 else 2
    interval = f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{entry['system']}: {interval} at Ω {entry['sparse_ratio']:.2f}, {entry['prompts']} prompts"
