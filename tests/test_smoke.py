"""The user's whole path in half a minute: a model folder, the two commands of the card as typed, an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fluxc.cli import main
from fluxc.tiny_folder import save_tiny_model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model folder in it."""
    base = tmp_path_factory.mktemp("work")
    save_tiny_model(base / "tiny-llama", layers=2)
    return base


@pytest.fixture(autouse=True)
def at_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def typed(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line as a user types it (no quoting); it must succeed. Gives stdout."""
    program, *argv = line.split()
    assert program == "fluxc"
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def typed_json(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(typed(f"{line} --json", capsys))
    return values


def test_from_model_to_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert "wrote model.pt" in typed("fluxc capture tiny-llama", capsys)
    assert "wrote model.flux" in typed("fluxc transform model.pt --budget 0.4", capsys)
    Path("prompt.txt").write_text("The moon is bright. " * 300)
    shown = typed_json("fluxc run model.flux --prompt-file prompt.txt --max-new-tokens 2", capsys)
    assert shown["budget"] == 0.4
    assert len(shown["layers"]) == 2
    assert len(shown["tokens"]) == 2
    assert {row["name"] for row in shown["timing"]["routed"]} == {"forced", "chosen"}
