"""How the systems of an evaluation are drawn: which colour, in what order, and what they are called in a legend."""

from __future__ import annotations

import dataclasses

from fluxc.report.scene import WIDTH, Dot, Line, Shape, Text


@dataclasses.dataclass(frozen=True)
class Look:
    """One kind of system: the start of its name, colour, name in the legend, whether its points are joined."""

    start: str
    colour: str
    label: str
    joined: bool = False


LOOKS = (
    Look("oracle", "oracle", "oracle", joined=True),
    Look("fluxc", "fluxc", "fluxc", joined=True),
    Look("best static", "static", "best static layers", joined=True),
    Look("static first-order", "static", "static, first order", joined=True),
    Look("static leave-one-out", "blind", "static, leave-one-out", joined=True),
    Look("random", "random", "random layers", joined=True),
    Look("every second layer", "blind", "every second layer"),
    Look("all sparse", "sparse", "all sparse"),
    Look("dense", "dense", "dense"),
)


def look_of(system: str) -> Look:
    """How a system is drawn; one that is not known is drawn as a blind choice under its own name."""
    return next((look for look in LOOKS if system.startswith(look.start)), Look(system, "blind", system))


def legend(looks: list[Look], y: float, left: float = 52) -> list[Shape]:
    """Signs and names in rows of their own, `y` the first baseline."""
    shapes: list[Shape] = []
    x = left
    for look in looks:
        width = 26 + 6.7 * len(look.label)
        if x + width > WIDTH and x > left:
            x, y = left, y + 19
        if look.joined:
            shapes.append(Line(((x, y - 4), (x + 14, y - 4)), look.colour, 2))
        shapes.append(Dot(x + 7, y - 4, 4, look.colour))
        shapes.append(Text(x + 20, y, look.label))
        x += width + 12
    return shapes


def legend_rows(looks: list[Look], left: float = 52) -> int:
    """Rows that `legend` takes."""
    return len({shape.y for shape in legend(looks, 0, left) if isinstance(shape, Text)})
