"""A figure as a list of shapes in pixels, so that the same drawing becomes SVG or a bitmap. Colours are theme names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]
WIDTH = 480
"""All figures are as wide: a phone shows them nearly at full size, a desktop two side by side."""


@dataclasses.dataclass(frozen=True)
class Rect:
    """A filled rectangle; `title` is shown under the pointer."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    opacity: float = 1.0
    radius: float = 0.0
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line through points. `dash`: lengths of strokes and gaps, none for a solid line."""

    points: tuple[Point, ...]
    stroke: str
    width: float = 1.0
    dash: tuple[float, ...] = ()
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: tuple[Point, ...]
    fill: str
    opacity: float = 1.0
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Dot:
    """A circle, filled with `fill` and ringed with the card's colour so that it stands off lines below."""

    x: float
    y: float
    radius: float
    fill: str
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """One line of text; (x, y) is on its baseline. `turn`: degrees, counterclockwise for people."""

    x: float
    y: float
    text: str
    size: float = 12.5
    fill: str = "mute"
    anchor: Anchor = "start"
    bold: bool = False
    turn: float = 0.0


Shape = Rect | Line | Area | Dot | Text


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing with its words. `name` is a file name; `alt` says what a reader who cannot see it should know."""

    name: str
    title: str
    caption: str
    alt: str
    height: float
    shapes: tuple[Shape, ...]
    width: float = WIDTH


def line(points: Sequence[Point], stroke: str, width: float = 1.0, **more: object) -> Line:
    """A Line through any sequence of points."""
    return Line(tuple(points), stroke, width, **more)  # type: ignore[arg-type]
