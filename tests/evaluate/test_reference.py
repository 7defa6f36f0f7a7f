"""The reference table: its cells, the comparison, and that transformers and fluxc fill it alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxc.cli.app import run
from fluxc.data import HELDOUT, generate
from fluxc.errors import SelfCheckError
from fluxc.evaluate.reference import _by_fluxc, _by_transformers, cells, check, reference, table_of
from fluxc.evaluate.subjects import FluxSubject
from fluxc.progress import SILENT

RESULTS = Path(__file__).resolve().parent.parent.parent / "bench/results"
ROW = {"length": 2500, "tokens": 2488, "loss": 0.1, "exact": True}


@pytest.mark.parametrize("change", [{"exact": False}, {"loss": 0.13}, {"tokens": 2487}])
def test_a_prompt_that_differs_is_named(change: dict[str, float]) -> None:
    check([ROW, ROW], [ROW, {**ROW, "loss": 0.11}, ROW])
    with pytest.raises(SelfCheckError, match=r"needle 1 differs .*: 2488 tokens, exact, loss 0\.1000"):
        check([ROW, ROW], [ROW, ROW | change])


def test_transformers_and_fluxc_score_alike(subject: FluxSubject, folder: Path) -> None:
    prompts = generate(["needle"], 2, subject.tokenizer, [400, 450], 0, HELDOUT, 4, 96)
    _, mine = _by_fluxc(str(folder / "tiny.flux"), SILENT)
    _, theirs = _by_transformers(str(folder / "tiny"), SILENT)
    found, expected = ([score(prompt) for prompt in prompts] for score in (mine, theirs))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    check(found, expected)
    assert [(cell["length"], cell["prompts"]) for cell in cells(found)] == [(400, 1), (450, 1)]


def test_the_committed_table_is_that_of_the_committed_result() -> None:
    table = json.loads((RESULTS / "eval-reference.json").read_text())
    assert table == table_of(json.loads((RESULTS / "quality-h100-streaming.json").read_text()))
    assert [(cell["length"], cell["prompts"]) for cell in table["cells"]] == [(2500, 24), (4000, 24)]


def test_what_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["smollm2", "--table", str(tmp_path / "none.json"), "-q"], reference) == 2
    assert "is no reference table" in capsys.readouterr().err
