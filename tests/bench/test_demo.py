"""The demo's table: what each column is made of, and that dense is dense."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fluxc.bench.demo import demo, lines
from fluxc.bench.demo_rows import Row
from fluxc.cli.app import run

ROW = Row("needle", "dense", 0, 1000, 0.0, True, 0.0, 0.0, seconds=10.0, attention=8.0, density=0.5)


def row(system: str, **changes: object) -> Row:
    import dataclasses

    return dataclasses.replace(ROW, system=system, **changes)  # type: ignore[arg-type]


def test_a_line_is_the_mean_over_prompts() -> None:
    rows = [
        row("dense"),
        row("dense", seconds=20.0, attention=16.0, loss=2.0, exact=False),
        row("fluxc", asked=0.6, sparse_ratio=0.5, seconds=8.0),
        row("fluxc", asked=0.6, sparse_ratio=0.7, seconds=12.0),
    ]
    dense, ours = lines(rows)
    assert dense == ("dense", "0.50", f"{math.exp(1):.3f}", "0.00", "0.00", "15.00", "1.00", "1.00", "1.00")
    ideal, bound = 15 / (15 - 0.6 * 12 * 0.5), 15 / (15 - 0.6 * 12)
    assert ours[3:] == ("0.60", "0.60", "10.00", "1.50", f"{ideal:.2f}", f"{bound:.2f}")


def test_text_has_no_exact_match() -> None:
    assert lines([row("dense", exact=None)])[0][1] == ""


@pytest.mark.slow
def test_all_systems_on_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fluxc.cli import main
    from fluxc.tiny_folder import save_tiny_model

    model, flux = save_tiny_model(tmp_path / "tiny"), str(tmp_path / "tiny.flux")
    assert main(["transform", str(model), "-o", flux, "--effort", "quick", "--sparse-kind", "streaming", "-q"]) == 0
    assert run([flux, "--prompts", "1", "--json", "-q"], demo) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    systems = {r["system"] for r in found}
    assert {"dense", "fluxc", "every second layer", "all sparse"} < systems
    assert len(found) == 4 * len(systems) == 4 * 5
    assert {r["sparse_ratio"] for r in found if r["system"] == "all sparse"} == {1.0}
    assert all(0 < r["attention"] < r["seconds"] for r in found if r["system"] == "dense")
