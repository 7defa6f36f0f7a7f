"""Scales, ticks, and the frame of a chart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from fluxc.report.scene import WIDTH, Line, Point, Shape, Text


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values low..high onto pixels start..end, linear or by logarithm; values outside are clamped by `inside`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        a, b, x = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (x - a) / (b - a) * (self.end - self.start)

    def inside(self, value: float) -> bool:
        """Whether the value lies on the scale."""
        return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True)
class Frame:
    """The plotting area of a chart: its two scales, and what is written along them."""

    x: Scale
    y: Scale

    def point(self, x: float, y: float) -> Point:
        """Pixels of a pair of values."""
        return self.x(x), self.y(y)

    def grid(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_label: str,
        y_label: str,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
    ) -> list[Shape]:
        """Horizontal lines, tick labels, and the names of both axes."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        shapes: list[Shape] = []
        for tick in y_ticks:
            at = self.y(tick)
            shapes += [
                Line(((left, at), (right, at)), "grid"),
                Text(left - 8, at + 4, y_text(tick), anchor="end"),
            ]
        shapes += [Text(self.x(tick), bottom + 19, x_text(tick), anchor="middle") for tick in x_ticks]
        shapes.append(Text(right, bottom + 38, x_label, anchor="end"))
        shapes.append(Text(left, top - 12, y_label))
        return shapes


def frame(x: tuple[float, float], y: tuple[float, float], height: float, top: float, *, log_x: bool = False) -> Frame:
    """The usual frame: room for labels at the left and below, `top` pixels for a legend above."""
    return Frame(Scale(*x, 52, WIDTH - 14, log_x), Scale(*y, height - 46, top))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in low..high, about `count`."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * at, 12) for at in range(first, math.floor(high / step + 1e-9) + 1)]


def doublings(low: float, high: float) -> list[float]:
    """Powers of two in low..high; every second one where there are many."""
    found = [2.0**at for at in range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)]
    return found if len(found) <= 8 else found[::2]


def tokens(value: float) -> str:
    """A length in tokens: 512, 4K, 128K."""
    if value < 1024:
        return f"{value:.0f}"
    return f"{value / 1024:.3g}K"
