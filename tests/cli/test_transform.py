"""`fluxc transform`: what it writes, resumes and refuses. Prompts are the test's own, short ones."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxc.calibrate import needs
from fluxc.capture.api import capture
from fluxc.cli import main
from fluxc.cli.bars import Bars
from fluxc.flux_dir import open_flux
from fluxc.tiny_folder import CONTEXT, save_tiny_model

QUICK = ("--effort", "quick", "--prompts", "mine.jsonl", "--sink", "4", "--window", "32")
WORDS = ["moon", "river", "stone", "cloud", "garden", "winter", "table", "number", "letter", "forest"]


def prompts(count: int = 12, words: int = 120) -> list[dict[str, str]]:
    rng = random.Random(0)
    texts = (" ".join(rng.choice(WORDS) for _ in range(words)) for _ in range(count))
    return [
        {"prompt": f"Code {number} is {1000 + number}. {text} What is code {number}?", "answer": f" {1000 + number}"}
        for number, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a Hugging Face folder."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", layers=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    """The same, captured."""
    path = folder.parent / "tiny.pt"
    capture(folder).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds the prompts."""
    monkeypatch.chdir(tmp_path)
    write_prompts(prompts())
    return tmp_path


def write_prompts(lines: list[Any]) -> None:
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def left_behind(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir() if path.name != "mine.jsonl")


def test_writes_a_calibrated_model(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transform", model, "--budget", "0.5", *QUICK, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert left_behind(work) == ["tiny.flux"]
    plan = open_flux("tiny.flux").plan
    assert shown["plan"] == json.loads(plan.to_json())
    assert plan.budget == 0.5
    assert {layer.window for layer in plan.layers} <= set(range(1, 33))
    assert shown["report"]["calibration"]["prompts"]["heldout"] == 4


def test_report_says_asked_and_achieved(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["transform", model, "--sparse-ratio", "0.5", *QUICK, "--sparse-kind", "streaming", "-o", "a.flux"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    achieved = open_flux("a.flux").plan.achieved_at()
    assert "asked    budget 0.50 (Ω 0.50)" in out
    assert f"achieved budget {achieved['full_share']:.2f}" in out
    assert "kind     streaming, sink 4, window 32, decode sparse" in out
    assert "wrote a.flux" in out


@pytest.mark.parametrize("allowed", [10.0, -1.0])
def test_report_says_what_full_layers_by_blocks_lose(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], allowed: float
) -> None:
    monkeypatch.setattr("fluxc.calibrate.full_kind.ALLOWED", allowed)
    kinds = ("--sparse-kind", "streaming", "--full-kind", "block")
    assert main(["transform", model, "--budget", "0.5", *QUICK, *kinds, "-o", "a.flux"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    kept = {layer.full_kind for layer in open_flux("a.flux").plan.layers}
    assert kept == {"block" if allowed > 0 else "dense"}
    assert re.search(r"full by blocks: [+-][0-9.]+% perplexity of answers.* on 4 held-out prompts; ", out)
    assert ("full layers read blocks of 16 holding 0.9 of the weight" in out) == (allowed > 0)
    assert ("not kept: more than -100.0%; full layers stay dense" in out) == (allowed < 0)


def test_interrupted_calibration_resumes(
    model: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["transform", model, "--budget", "0.5", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(Bars, "advance", interrupting(3))
        assert main(argv) == 130
    err = capsys.readouterr().err
    assert err.endswith("interrupted: 3 measurements are kept in tiny.flux.measuring; the same command resumes\n")
    assert left_behind(work) == ["tiny.flux.measuring"]
    measured = counting(monkeypatch)
    assert main([*argv, "-q"]) == 0
    assert len(measured) == 8 - 3
    assert left_behind(work) == ["tiny.flux"]


def test_a_disk_that_fills_up_while_measuring(
    model: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["transform", model, "--budget", "0.5", *QUICK, "-q"]
    cache, sync = work / "tiny.flux.measuring", os.fsync

    def full(descriptor: int) -> None:
        if len(list(cache.glob("need-*.json"))) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(argv) == 2
    # The third is in place when its folder cannot be synced any more; nothing half-written stands beside the three.
    assert [path.suffix for path in cache.iterdir()] == [".json"] * 3
    assert left_behind(work) == ["tiny.flux.measuring"]
    resumes(argv, 3, monkeypatch, capsys, "cannot write tiny.flux.measuring/need-")


def test_a_disk_that_fills_up_while_writing(
    model: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["transform", model, "--budget", "0.5", *QUICK, "-q"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))  # the weights are 830 KB
    try:
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_behind(work) == ["tiny.flux.measuring"]
    resumes(argv, 8, monkeypatch, capsys, "cannot write tiny.flux: File too large; write to a place that takes larger")


def resumes(
    argv: list[str], kept: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    """The error was one line that says what went wrong and what is kept; the same command measures the rest."""
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith(f"error: {said}")
    assert f"; {kept} measurements are kept in tiny.flux.measuring; the same command resumes" in captured.err
    measured = counting(monkeypatch)
    assert main(argv) == 0
    assert len(measured) == 8 - kept
    assert left_behind(Path.cwd()) == ["tiny.flux"]


def test_a_disk_that_is_too_small_is_found_before_measuring(
    model: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(work)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(
        ["transform", model, *QUICK], "cannot write tiny.flux: 0.06 GB are needed and 0.00 GB are free", work, capsys
    )


def interrupting(after: int) -> Callable[..., None]:
    """An `advance` that is a user's Ctrl-C at its call number `after`."""
    left = iter(range(after - 1, -1, -1))

    def advance(self: Bars, steps: int = 1) -> None:
        if next(left) == 0:
            raise KeyboardInterrupt

    return advance


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The prompts that are measured from now on, not read from the cache."""
    measured: list[Any] = []
    measure = needs._measure
    monkeypatch.setattr(needs, "_measure", lambda *args: measured.append(args[-1]) or measure(*args))
    return measured


def test_linked_weights_stay_in_the_source(folder: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, "tiny")
    argv = ["transform", "tiny", "--budget", "0.5", *QUICK, "--sparse-kind", "streaming", "--link", "--pool", "40"]
    assert main(argv) == 0
    assert "linked, not copied: model.safetensors in tiny must stay there" in capsys.readouterr().out
    flux = open_flux("tiny.flux")
    assert flux.plan.pool == 40
    source = (work / "tiny/model.safetensors").resolve()
    assert list(flux.manifest.links) == [str(source)]
    assert list((work / "tiny.flux/weights").iterdir()) == []
    data = source.read_bytes()
    source.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["run", "tiny.flux", "--prompt", "hello", "-q"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {source} has changed since tiny.flux was linked to it; ")
    assert err.count("\n") == 1


def test_a_captured_file_cannot_be_linked_to(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--dry-run"]):
        argv = ["transform", model, *QUICK, "--link", *more]
        refused(argv, f"{model} holds its weights inside and cannot be linked to; name the", work, capsys)


def test_same_seed_same_plan(model: str) -> None:
    for name in ("a.flux", "b.flux"):
        assert main(["transform", model, "--budget", "0.5", *QUICK, "-o", name, "-q"]) == 0
    assert open_flux("a.flux").plan.digest() == open_flux("b.flux").plan.digest()


def test_dry_run_writes_nothing(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transform", model, "--budget", "0.3", *QUICK, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "calibrate it to budget 0.3 (Ω 0.7) and write tiny.flux" in out
    assert left_behind(work) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--budget", "1.2"], "--budget 1.2 is outside 0..1"),
        (["--sparse-ratio", "-1"], "--sparse-ratio -1 is outside 0..1"),
        (["--budget", "0.4", "--sparse-ratio", "0.6"], "say the same thing"),
        (["--budget", "half"], "'half' is not a valid float"),
        (["--effort", "heroic"], "unknown effort 'heroic'; choose one of quick, normal, thorough"),
        (["--sparse-kind", "magic"], "unknown sparse kind 'magic'"),
        (["--decode", "both"], "unknown decode 'both'"),
        (["--window", "0"], "window is 0"),
        (["--sink", "-1"], "sink is -1"),
        (["--pool", "0"], "pool is 0"),
        (["--seed", "-1"], "-1 is not in the range"),
        (["--prompts", "none.jsonl"], "cannot read none.jsonl"),
    ],
)
def test_bad_options(model: str, work: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["transform", model, *argv], said, work, capsys)


def test_a_window_too_large_for_the_context(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["transform", model, "--window", str(CONTEXT)], "too large for a context of 4096 tokens", work, capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "mine.jsonl, line 13: not valid JSON"),
        ('["prompt"]', "mine.jsonl, line 13"),
        ('{"answer": "a"}', "mine.jsonl, line 13"),
        ('{"prompt": 3}', "mine.jsonl, line 13"),
    ],
)
def test_a_bad_prompt_line(model: str, work: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("mine.jsonl").open("a") as file:
        file.write(line + "\n")
    refused(["transform", model, *QUICK], said, work, capsys)


def test_a_prompt_longer_than_the_context(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts([*prompts(), *prompts(1, words=CONTEXT)])
    refused(["transform", model, *QUICK], "mine.jsonl, line 13: the prompt and its answer have", work, capsys)


def test_too_few_prompts(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(prompts(3))
    refused(["transform", model, *QUICK], "mine.jsonl holds 3 prompts", work, capsys)


def test_an_output_that_exists(model: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tiny.flux").mkdir()
    Path("tiny.flux/precious").touch()
    refused(["transform", model, *QUICK], "tiny.flux already exists; give --force", work, capsys, ["tiny.flux"])
    refused(["transform", model, *QUICK, "--force"], "was not written by fluxc", work, capsys, ["tiny.flux"])
    assert Path("tiny.flux/precious").exists()


def refused(
    argv: list[str], said: str, work: Path, capsys: pytest.CaptureFixture[str], before: list[str] | None = None
) -> None:
    """The command line ends with exit code 2, one line, and no trace in the working directory."""
    assert main([*argv, "-q"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert left_behind(work) == (before or [])
