"""Figures as SVG: inline in the page, or standing alone with their colours for both schemes."""

from __future__ import annotations

from html import escape

from fluxc.report.scene import Area, Dot, Figure, Line, Point, Rect, Shape, Text
from fluxc.report.theme import FONT, colour_rules


def inline(figure: Figure) -> str:
    """An SVG element that takes its colours from the page."""
    return _element(figure, "")


def standalone(figure: Figure, background: bool = True) -> str:
    """A whole SVG file; `background` paints the card below the drawing."""
    card = Rect(0, 0, figure.width, figure.height, "card", radius=14)
    style = f"<style>{colour_rules()}</style>"
    return _element(figure, style + (_shape(card) if background else "")) + "\n"


def _element(figure: Figure, before: str) -> str:
    size = f"{_number(figure.width)} {_number(figure.height)}"
    body = "".join(map(_shape, figure.shapes))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="{escape(figure.alt)}" '
        f'font-family="{escape(FONT)}">{before}{body}</svg>'
    )


def _shape(shape: Shape) -> str:
    match shape:
        case Rect():
            return _rect(shape)
        case Line():
            return _line(shape)
        case Area():
            points = _points(shape.points)
            return _titled(f'<polygon points="{points}" class="f-{shape.fill}"{_opacity(shape.opacity)}', shape.title)
        case Dot():
            place = f'cx="{_number(shape.x)}" cy="{_number(shape.y)}" r="{_number(shape.radius)}"'
            return _titled(f'<circle {place} class="f-{shape.fill} s-card" stroke-width="1.5"', shape.title)
        case Text():
            return _text(shape)


def _rect(shape: Rect) -> str:
    numbers = zip(("x", "y", "width", "height"), (shape.x, shape.y, shape.width, shape.height), strict=True)
    place = " ".join(f'{name}="{_number(value)}"' for name, value in numbers)
    radius = f' rx="{_number(shape.radius)}"' if shape.radius else ""
    return _titled(f'<rect {place}{radius} class="f-{shape.fill}"{_opacity(shape.opacity)}', shape.title)


def _line(shape: Line) -> str:
    dash = f' stroke-dasharray="{" ".join(map(_number, shape.dash))}"' if shape.dash else ""
    return (
        f'<polyline points="{_points(shape.points)}" fill="none" class="s-{shape.stroke}" '
        f'stroke-width="{_number(shape.width)}" stroke-linejoin="round" stroke-linecap="round"'
        f"{dash}{_opacity(shape.opacity)}/>"
    )


def _text(shape: Text) -> str:
    turn = f' transform="rotate({_number(-shape.turn)} {_number(shape.x)} {_number(shape.y)})"' if shape.turn else ""
    bold = ' font-weight="650"' if shape.bold else ""
    anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
    return (
        f'<text x="{_number(shape.x)}" y="{_number(shape.y)}" font-size="{_number(shape.size)}" '
        f'class="f-{shape.fill}"{anchor}{bold}{turn}>{escape(shape.text)}</text>'
    )


def _titled(element: str, title: str) -> str:
    name = element[1:].split(" ", 1)[0]
    return f"{element}><title>{escape(title)}</title></{name}>" if title else f"{element}/>"


def _points(points: tuple[Point, ...]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _opacity(value: float) -> str:
    return "" if value == 1 else f' opacity="{_number(value)}"'


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
