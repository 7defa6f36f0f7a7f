"""`fluxc capture` on a model folder as users have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxc.capture.result import load_capture
from fluxc.cli import main
from fluxc.tiny_folder import CONTEXT, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", layers=1)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_writes_one_file_and_says_so(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capture", str(model)]) == 0
    assert [path.name for path in work.iterdir()] == ["model.pt"]
    out = capsys.readouterr().out
    assert f"llama, 1 layers, context {CONTEXT}" in out
    assert "wrote model.pt" in out


def test_json_says_what_was_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capture", str(model), "-o", "a.pt", "--dtype", "bfloat16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    captured = load_capture("a.pt")
    assert shown["meta"] == captured.meta
    assert shown["meta"]["dtype"] == "bfloat16"
    assert shown["bytes"] == Path("a.pt").stat().st_size
    assert "tokenizer.json" in captured.tokenizer_files


def test_captures_its_own_output_again(model: Path) -> None:
    assert main(["capture", str(model), "-q", "-o", "a.pt"]) == 0
    assert main(["capture", "a.pt", "-q", "-o", "b.pt"]) == 0
    assert load_capture("b.pt").meta == load_capture("a.pt").meta


def test_dry_run_writes_nothing(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capture", str(model), "--dry-run"]) == 0
    assert f"would capture {model} (folder) and write model.pt" in capsys.readouterr().out
    assert list(work.iterdir()) == []


def test_force_replaces(model: Path) -> None:
    Path("model.pt").write_text("old")
    assert main(["capture", str(model), "-q", "--force"]) == 0
    assert load_capture("model.pt").meta["family"] == "llama"
