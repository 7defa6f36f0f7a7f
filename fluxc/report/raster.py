"""Figures as PNG, by matplotlib (`pip install 'fluxc[eval]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fluxc.errors import OptionError
from fluxc.report.scene import Area, Dot, Figure, Line, Rect, Shape, Text
from fluxc.report.theme import DARK, LIGHT

DPI = 100
SCALE = 2.0
"""Pixels of the bitmap for one of the figure."""
ANCHORS = {"start": "left", "middle": "center", "end": "right"}
POINT = 72 / DPI
"""Points of type for a pixel of the figure."""


def write_png(figure: Figure, path: Path, dark: bool = False) -> None:
    """Write the figure at twice its size. Raises OptionError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as cause:
        raise OptionError("--png needs matplotlib", hint="pip install 'fluxc[eval]'") from cause
    colours = DARK if dark else LIGHT
    canvas = Canvas(figsize=(figure.width / DPI, figure.height / DPI), dpi=DPI * SCALE, facecolor=colours["card"])
    FigureCanvasAgg(canvas)
    axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, figure.width)
    axes.set_ylim(figure.height, 0)
    for order, shape in enumerate(figure.shapes):
        _draw(axes, shape, colours, order)
    canvas.savefig(path, format="png", facecolor=colours["card"])


def _draw(axes: Any, shape: Shape, colours: dict[str, str], order: int) -> None:
    from matplotlib import patches

    look: dict[str, Any] = {"zorder": order}
    match shape:
        case Rect():
            look |= {"color": colours[shape.fill], "alpha": shape.opacity, "lw": 0}
            axes.add_patch(patches.Rectangle((shape.x, shape.y), shape.width, shape.height, **look))
        case Area():
            look |= {"color": colours[shape.fill], "alpha": shape.opacity, "lw": 0}
            axes.add_patch(patches.Polygon(shape.points, **look))
        case Dot():
            look |= {"fc": colours[shape.fill], "ec": colours["card"], "lw": 1.5 * POINT}
            axes.add_patch(patches.Circle((shape.x, shape.y), shape.radius, **look))
        case Line():
            look |= {"color": colours[shape.stroke], "lw": shape.width * POINT, "alpha": shape.opacity}
            dashes = {"dashes": [part / shape.width for part in shape.dash]} if shape.dash else {}
            axes.plot(*zip(*shape.points, strict=True), **look, **dashes)
        case Text():
            look |= {"color": colours[shape.fill], "fontsize": shape.size * POINT, "rotation": shape.turn}
            look |= {"ha": ANCHORS[shape.anchor], "va": "baseline", "weight": "bold" if shape.bold else "normal"}
            axes.text(shape.x, shape.y, shape.text, **look)
