"""`fluxc eval`: what it writes and shows, how it resumes, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxc.calibrate.runner import Outcome
from fluxc.capture.api import capture
from fluxc.cli import main
from fluxc.evaluate.subjects import FluxSubject
from fluxc.tiny_folder import CONTEXT, save_tiny_model

SMALL = ("--suite", "local", "--count", "2", "--length", "450", "--device", "cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model.flux with a tokenizer, routers of random weights, no measurements."""
    from fluxc.ir.sparse import SparseSettings

    base = tmp_path_factory.mktemp("flux")
    captured = capture(save_tiny_model(base / "tiny", layers=2))
    from fluxc.artifact import write_flux
    from fluxc.model_info import ModelInfo
    from fluxc.toy_flux import flat_plan, toy_routed
    from fluxc.weight_files import weights_digest

    sparse = SparseSettings(sink=4, window=160)
    info = ModelInfo.of(captured.program, captured.meta, weights_digest(captured.program.state_dict))
    plan, routed = flat_plan(info, sparse=sparse), toy_routed(captured.program, sparse)
    write_flux(base / "tiny.flux", captured.program, routed, plan, captured.meta, captured.tokenizer_files)
    return str(base / "tiny.flux")


def test_rows_tables_and_csv(flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "x.eval.json", tmp_path / "rows.csv"
    assert main(["eval", flux, *SMALL, "--budget", "0.99", "-o", str(out), "--csv", str(table)]) == 0
    printed = capsys.readouterr()
    assert all(word in printed.out for word in ("local: 2 prompts", "every second layer", "random 0.99", "few-shot"))
    assert "no best static choice: the folder holds no measurements" in printed.err
    found = json.loads(out.read_text())
    assert {row["system"] for row in found["rows"]} >= {"dense", "all sparse", "fluxc 0.99"}
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == [row["system"] for row in found["rows"]]
    assert float(rows[0]["loss"]) == found["rows"][0]["loss"]
    assert not out.with_name(out.name + ".samples").exists()


def test_json_alone_on_stdout(flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", flux, *SMALL, "--json", "-q", "-o", str(tmp_path / "x.json")]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {entry["suite"] for entry in shown["summary"]} == {"local"}
    assert shown["conditions"]["budgets"] == [0.4]


def test_interrupted_and_resumed(
    flux: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert main(["eval", flux, *SMALL, "-q", "-o", str(whole)]) == 0
    run, calls = FluxSubject.outcomes, []

    def outcomes(self: FluxSubject, *args: Any) -> list[Outcome]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(FluxSubject, "outcomes", outcomes)
    assert main(["eval", flux, *SMALL, "-q", "-o", str(out)]) == 130
    assert f"3 samples are kept in {out}.samples; the same command resumes" in capsys.readouterr().err
    assert main(["eval", flux, *SMALL, "-q", "-o", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == json.loads(whole.read_text())["rows"]
    done = len(calls)
    assert main(["eval", flux, *SMALL, "-q", "-o", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["eval", flux, *SMALL, "-q", "-o", str(out), "--force"]) == 0
    assert len(calls) == done, "a result that is replaced hands over its samples"


@pytest.mark.slow
def test_two_processes_at_the_same_time(flux: str, tmp_path: Path) -> None:
    """Both end with the numbers of one process alone."""
    whole, shared = tmp_path / "whole.json", tmp_path / "shared.json"
    assert main(["eval", flux, *SMALL, "-q", "-o", str(whole)]) == 0
    command = [sys.executable, "-P", "-m", "fluxc", "eval", flux, *SMALL, "-q", "-o", str(shared)]
    running = [subprocess.Popen([*command, "--force", "--part", part]) for part in ("1/2", "2/2")]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert json.loads(shared.read_text())["rows"] == json.loads(whole.read_text())["rows"]


def test_prompts_of_the_user(flux: str, tmp_path: Path) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "out.json"
    lines = [{"prompt": "The moon is bright. " * 40, "answer": "yes", "task": "sky"}, {"prompt": "The sea. " * 60}]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert main(["eval", flux, "--data", str(data), "-q", "-o", str(out), "--device", "cpu"]) == 0
    found = json.loads(out.read_text())
    assert list(found["suites"]) == ["user"]
    assert {(row["task"], row["exact"] is None) for row in found["rows"]} == {("sky", False), ("user", True)}
    assert all(entry["short"] == entry["prompts"] for entry in found["summary"] if entry["scope"] == "all")


def test_dry_run_says_how_much(flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["eval", flux, *SMALL, "-n", "-o", str(out)]) == 0
    assert "would run 10 forward passes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--suite", "poetry"], "there is no suite 'poetry'; the suites are retrieval, needle, text"),
        (["--suite", "needle", "--length", "9000"], f"lengths that fit: 429 to {CONTEXT} tokens"),
        (["--suite", "needle", "--length", "300"], "cannot have prompts of 300 tokens"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 2: not valid JSON"),
        (["--corpus", "nowhere"], "the corpus folder nowhere does not exist"),
        (["--budget", "1.5"], "1.5 is not in the range"),
        (["--part", "3"], "--part 3 is not two numbers"),
        (["--part", "3/2"], "part 3/2 is none"),
        (["--oracle", "magic"], "'magic' is not one of"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_input(
    flux: str,
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": ')
    assert main(["eval", flux, *argv, "-q"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nowhere.flux", "-q"]) == 2
    assert "nowhere.flux does not exist" in capsys.readouterr().err
