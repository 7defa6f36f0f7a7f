"""`fluxc inspect` lists what is there, with sizes and reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxc.capture.api import capture
from fluxc.cli import main
from fluxc.testing import TINY_FAMILIES
from fluxc.toy_flux import toy_flux


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A captured Gemma-3: layers with a window of their own, and one without."""
    path = tmp_path_factory.mktemp("captured") / "gemma.pt"
    capture(TINY_FAMILIES["gemma3"]()).save(path)
    return str(path)


def inspected(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["inspect", *argv, "--json"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_windows_are_told_from_routable_layers(captured: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = inspected(capsys, captured)
    routable = [record["routable"] for record in shown["attentions"]]
    assert shown["meta"]["layers"] == len(routable)
    assert any(routable)
    assert not all(routable)
    assert main(["inspect", captured]) == 0
    out = capsys.readouterr().out
    assert f"{len(routable)} attentions, {sum(routable)} routable" in out
    assert "has a window of its own" in out


def test_weights_that_are_tied_count_once(captured: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = TINY_FAMILIES["gemma3"]()
    assert inspected(capsys, captured)["weights"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_graph_prints_the_program(captured: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", captured, "--graph"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("program(input_ids: i64[B,S], position_ids: i64[B,S]")
    assert inspected(capsys, captured, "--graph")["graph"] == out.rstrip("\n")


def test_a_flux_folder_shows_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_flux(tmp_path / "toy.flux")
    assert main(["inspect", str(tmp_path / "toy.flux")]) == 0
    out = capsys.readouterr().out
    assert "streaming 4 + 12" in out
    assert "budget 0.4 (Ω 0.6)" in out


class Windowless(torch.nn.Module):
    """One attention that fluxc can take, and one that looks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 16)
        self.head = torch.nn.Linear(16, 11)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for causal in (True, False):
            q = x.unflatten(-1, (2, 8)).transpose(1, 2)
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x)


def test_a_foreign_program_says_what_is_refused_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    B, S = torch.export.Dim("B", min=1), torch.export.Dim("S", min=1)
    example = (torch.zeros(2, 5, dtype=torch.int64),)
    program = torch.export.export(Windowless(), example, dynamic_shapes=({0: B, 1: S},))
    torch.export.save(program, tmp_path / "foreign.pt2")
    notes = inspected(capsys, str(tmp_path / "foreign.pt2"))["notes"]
    assert [note["matched"] for note in notes] == [True, False]
    assert "every token sees every other" in notes[1]["reason"]


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_what_is_no_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", name, "-q"]) == 2
