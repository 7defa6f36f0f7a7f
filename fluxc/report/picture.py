"""`python -m fluxc.report.picture result.json -o picture.svg`: routes and what they cost, side by side, for a README.

The result is one of `fluxc eval` or of `fluxc.bench.quality`; the picture carries its colours for light and dark.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.errors import DataError
from fluxc.report.scene import WIDTH, Area, Dot, Figure, Line, Rect, Shape, Text

GAP = 28
TOP = 64
BOTTOM = 40


@command(
    "picture",
    examples="""
    python -m fluxc.report.picture bench/results/quality-h100.json --suite mixed --budget 0.4 -o docs/result.svg
    """,
)
@click.argument("result", type=click.Path(path_type=Path))
@click.option("--suite", default="mixed", show_default=True, help="The suite to draw.")
@click.option("--budget", type=float, default=0.4, show_default=True, help="The budget whose routes are drawn.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The SVG file; replaced.")
def picture(screen: Screen, result: Path, suite: str, budget: float, output: Path) -> None:
    """Draw one suite of a stored result: which layers run full for which task, and perplexity against Ω."""
    from fluxc.atomic import atomic_file
    from fluxc.report.svg import standalone

    made = composed(result, suite, budget)
    with atomic_file(output, force=True) as temporary:
        temporary.write_text(standalone(made), encoding="utf-8")
    screen.show(f"{made.alt}: {output}")
    screen.result({"output": str(output), "alt": made.alt})


def composed(result: Path, suite: str, budget: float) -> Figure:
    """Both figures with their titles above and the conditions below. Raises DataError for what is not in the result."""
    from fluxc.bench.systems import plan_name
    from fluxc.report.accuracy import perplexity_figure
    from fluxc.report.findings import entries_of
    from fluxc.report.layers import task_map
    from fluxc.report.material import read_evaluation

    evaluation = read_evaluation(result)
    rows = [row for row in evaluation["rows"] if (row["suite"], row["system"]) == (suite, plan_name(budget))]
    if not rows:
        raise DataError(f"{result} has no rows of {plan_name(budget)} on {suite}", hint="choose --suite and --budget")
    left = task_map(rows, range(len(rows[0]["routes"])), "")
    right = perplexity_figure(suite, entries_of(evaluation, suite), "")
    height = TOP + max(left.height, right.height) + BOTTOM
    words = (
        *_title(
            0, "Each task gets the layers it needs", f"share of prompts on which a layer runs full, budget {budget:g}"
        ),
        *_title(WIDTH + GAP, "What a budget costs", "perplexity over dense against the share of sparse layers"),
        Text(20, height - 16, _conditions(evaluation, rows), 12),
    )
    shapes = (*words, *_moved(left, 8, TOP + 30), *_moved(right, WIDTH + GAP, TOP))
    return Figure("result", "", "", f"{left.alt}. {right.alt}", height, shapes, 2 * WIDTH + GAP + 12)


def _title(x: float, first: str, second: str) -> tuple[Text, Text]:
    return Text(x + 20, 32, first, 19, "ink", bold=True), Text(x + 20, 52, second, 13)


def _conditions(evaluation: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    conditions, lengths = evaluation["conditions"], [row["tokens"] for row in rows]
    return (
        f"{conditions['model'].removesuffix('.gguf')}, {conditions['device']}; {len(rows)} held-out prompts of "
        f"{min(lengths):,} to {max(lengths):,} tokens; sink {conditions['sink']}, window {conditions['window']}, "
        f"decode {conditions['decode']}; 95 % intervals"
    )


def _moved(figure: Figure, dx: float, dy: float) -> list[Shape]:
    return [_shifted(shape, dx, dy) for shape in figure.shapes]


def _shifted(shape: Shape, dx: float, dy: float) -> Shape:
    match shape:
        case Line() | Area():
            return dataclasses.replace(shape, points=tuple((x + dx, y + dy) for x, y in shape.points))
        case Rect() | Dot() | Text():
            return dataclasses.replace(shape, x=shape.x + dx, y=shape.y + dy)


if __name__ == "__main__":
    sys.exit(run_frame(command=picture, name="python -m fluxc.report.picture"))
