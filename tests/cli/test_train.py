"""`fluxc train`: what it says, refuses, resumes and leaves alone."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxc.capture.api import capture
from fluxc.cli import main
from fluxc.flux_dir import open_flux
from fluxc.tiny_folder import save_tiny_model
from fluxc.toy_flux import flux_of
from fluxc.train.trainer import Trainer

WORDS = ["moon", "river", "stone", "cloud", "garden", "winter", "table", "number", "letter", "forest"]
SHORT = ("--data", "mix.jsonl", "--steps", "4", "--batch", "4", "--device", "cpu", "--target", "kv=0.5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    captured = capture(save_tiny_model(folder / "tiny", layers=2, context=512))
    flux_of(folder / "m.flux", captured.program, captured.meta, tokenizer_files=captured.tokenizer_files)
    return folder / "m.flux"


@pytest.fixture(autouse=True)
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model.flux and data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "m.flux")
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(20)) for _ in range(24)]
    rows = [
        {"prompt": f"Code {n}: {text}?", "answer": f" {n}", "task": ("kv", "local")[n % 2]}
        for n, text in enumerate(texts)
    ]
    Path("mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_trains_and_reports(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_flux("m.flux").manifest.files["routers.safetensors"]
    assert main(["train", "m.flux", *SHORT]) == 0
    captured = capsys.readouterr()
    assert "achieved" in captured.out
    assert "padding" in captured.out
    assert "step 4 of 4: answer loss" in captured.err
    assert open_flux("m.flux").manifest.files["routers.safetensors"] != before
    assert sorted(path.name for path in work.iterdir()) == ["m.flux", "mix.jsonl"]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "m.flux", *SHORT, "--json", "-q"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["plan"] == json.loads(open_flux("m.flux").plan.to_json())
    assert shown["report"]["options"]["targets"]["kv"] == 0.5


def test_dry_run_writes_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert main(["train", "m.flux", *SHORT, "--dry-run", "--json", "--preset", "paper"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["targets"] == {"kv": 0.5, "local": 1.0}
    assert shown["prompts"] == {"train": 18, "curve": 4, "heldout": 2}
    assert shown["padding"] <= 0.1
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before


def test_ctrl_c_keeps_the_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = Trainer.run_step

    def interrupted(self: Trainer) -> object:
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    assert main(["train", "m.flux", *SHORT]) == 130
    said = "interrupted: 1 checkpoint is kept in m.flux.training/checkpoints; the same command resumes\n"
    assert capsys.readouterr().err.endswith(said)
    monkeypatch.setattr(Trainer, "run_step", real)
    assert main(["train", "m.flux", *SHORT]) == 0
    assert "going on after step 2" in capsys.readouterr().err


def test_killed_without_warning_and_resumed_equals_uninterrupted(work: Path) -> None:
    argv = ["--data", "mix.jsonl", "--steps", "30", "--batch", "2", "--save-every", "4", "--device", "cpu", "-q"]
    shutil.copytree("m.flux", "whole.flux")
    assert main(["train", "whole.flux", *argv]) == 0
    running = subprocess.Popen([sys.executable, "-P", "-m", "fluxc", "train", "m.flux", *argv])
    deadline = time.monotonic() + 60
    while not list(work.glob("m.flux.training/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert list(work.glob("m.flux.training/checkpoints/step-*"))
    assert main(["train", "m.flux", *argv]) == 0
    for name in ("routers.safetensors", "plan.json", "measurements/training.csv"):
        assert Path("m.flux", name).read_bytes() == Path("whole.flux", name).read_bytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "slow"], "unknown preset 'slow'"),
        (["--target", "kv"], "--target kv; write TASK=Ω"),
        (["--target", "kv=2"], "target of kv is 2.0; Ω lies between 0 and 1"),
        (["--steps", "0"], "steps is 0"),
        (["--data", "none.jsonl"], "cannot read none.jsonl"),
        (["--dtype", "int8"], "dtype is int8"),
    ],
)
def test_bad_input(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "m.flux", *argv, "-q"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
