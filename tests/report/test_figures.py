"""Figures: the numbers land where they belong, and a bitmap is the same drawing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fluxc.report.accuracy import exact_figure, perplexity_figure
from fluxc.report.axes import Scale, doublings, ticks, tokens
from fluxc.report.cost import kv_figure
from fluxc.report.figures import all_figures
from fluxc.report.findings import entries_of, takeaway
from fluxc.report.layers import LEFT, RIGHT, need_bars, task_map
from fluxc.report.material import Material, gather, read_evaluation
from fluxc.report.scene import Area, Dot, Figure, Line, Rect, Text
from fluxc.report.svg import inline, standalone

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def material(toy: Path) -> Material:
    return gather(toy)


def texts(figure: Figure) -> list[str]:
    return [shape.text for shape in figure.shapes if isinstance(shape, Text)]


def titles(figure: Figure) -> list[str]:
    return [shape.title for shape in figure.shapes if isinstance(shape, (Dot, Rect, Area)) and shape.title]


def test_scales_and_ticks() -> None:
    assert Scale(0, 1, 100, 0)(0.25) == 75
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.99, 1.22) == pytest.approx([1.0, 1.05, 1.1, 1.15, 1.2])
    assert doublings(900, 9000) == [1024, 2048, 4096, 8192]
    assert [tokens(value) for value in (512, 4096, 131072)] == ["512", "4K", "128K"]


def test_every_figure_is_there_and_stays_inside_its_frame(material: Material) -> None:
    figures = all_figures(material)
    names = [figure.name for figure in figures]
    assert names == [
        *("exact-retrieval", "perplexity-text", "exact-local"),
        *("routes-by-task", "routes-by-prompt", "need", "speed", "kv"),
    ]
    for figure in figures:
        for shape in figure.shapes:
            points = shape.points if isinstance(shape, (Line, Area)) else [(shape.x, shape.y)]
            assert all(-1 <= x <= figure.width + 1 and -1 <= y <= figure.height for x, y in points), (
                figure.name,
                shape,
            )
            assert all(math.isfinite(value) for point in points for value in point)


def test_points_of_an_accuracy_figure(material: Material) -> None:
    assert material.evaluation is not None
    entries = entries_of(material.evaluation, "retrieval")
    figure = exact_figure("retrieval", entries, "")
    shown = [title for title in titles(figure) if title.startswith("fluxc 0.4")]
    ours = next(entry for entry in entries if entry["system"] == "fluxc 0.4")
    assert shown == [
        f"fluxc 0.4: {ours['exact'][0]:.2f} [{ours['exact'][1]:.2f}, {ours['exact'][2]:.2f}] "
        f"at Ω {ours['sparse_ratio']:.2f}, 8 prompts"
    ]
    assert len(titles(figure)) == len(entries)


def test_what_is_far_worse_is_named_at_the_edge(material: Material) -> None:
    assert material.evaluation is not None
    figure = perplexity_figure("text", entries_of(material.evaluation, "text"), "")
    far = next(e for e in entries_of(material.evaluation, "text") if e["system"] == "all sparse")
    assert f"{far['perplexity_over_dense'][0]:.1f}" in texts(figure)


def test_a_sentence_names_whoever_is_ahead(material: Material) -> None:
    assert material.evaluation is not None
    said = takeaway(entries_of(material.evaluation, "text"), 0.4)
    assert said.startswith("At budget 0.4 fluxc has perplexity ×")
    assert "best static, perplexity ×" in said


def test_heat_map_shades_by_share() -> None:
    rows = [{"task": "needle", "prompt": at, "routes": routes} for at, routes in enumerate(("10", "11", "10", "10"))]
    figure = task_map(rows, [0, 7], "")
    shares = [shape.opacity for shape in figure.shapes if isinstance(shape, Rect) and shape.fill == "fluxc"]
    assert shares == [1.0, 0.25]
    assert "needle, layer 7: full on 25% of 4 prompts" in titles(figure)


def test_needs_are_as_high_as_they_are_large() -> None:
    bars = [s for s in need_bars([0.4, 0.1, -0.2], [0, 1, 2], "").shapes if isinstance(s, Rect) and s.fill == "need"]
    assert bars[0].height == pytest.approx(4 * bars[1].height)
    assert bars[2].height < 2
    assert bars[0].x >= LEFT and bars[-1].x + bars[-1].width <= RIGHT


def test_kv_of_the_plan(material: Material) -> None:
    figure = kv_figure(material.plan, 0.4, "")
    longest = material.plan.model.context
    dense, sparse = (material.plan.kv_bytes([full] * 2, longest) for full in (True, False))
    saved = 1 - (0.4 * dense + 0.6 * sparse) / dense
    assert f"{saved:.0%} less" in texts(figure)


def test_svg_escapes_and_stands_alone() -> None:
    figure = Figure("x", "", "", 'a "b" <c>', 10, (Text(0, 5, "1 < 2 & 3"),))
    assert "1 &lt; 2 &amp; 3" in inline(figure)
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in inline(figure)
    assert "prefers-color-scheme" in standalone(figure)


def test_png_is_the_figure_at_twice_its_size(material: Material, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="`pip install 'fluxc[eval]'` brings it")
    from fluxc.report.raster import write_png

    figure = all_figures(material)[0]
    write_png(figure, tmp_path / "x.png")
    head = (tmp_path / "x.png").read_bytes()[:24]
    assert head[1:4] == b"PNG"
    sizes = [int.from_bytes(head[at : at + 4], "big") for at in (16, 20)]
    assert sizes == [2 * figure.width, pytest.approx(2 * figure.height, abs=1)]


def test_the_readmes_picture_is_that_of_the_committed_result(tmp_path: Path) -> None:
    from fluxc.cli.app import run
    from fluxc.report.picture import picture

    made = tmp_path / "result.svg"
    assert run([str(ROOT / "bench/results/quality-h100.json"), "-o", str(made), "-q"], picture) == 0
    assert made.read_text() == (ROOT / "docs/result.svg").read_text(), "docs/result.svg: run the command again"


def test_results_of_the_quality_benchmark_are_read() -> None:
    found = read_evaluation(ROOT / "bench/results/quality-h100.json")
    ours = next(e for e in entries_of(found, "mixed") if e["system"] == "fluxc 0.4")
    # The README's table.
    assert (round(ours["sparse_ratio"], 2), round(ours["perplexity_over_dense"][0], 3)) == (0.62, 1.018)
