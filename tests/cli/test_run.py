"""`fluxc run` answers with the routes that were asked for, and says what it did."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fluxc.capture.api import capture
from fluxc.cli import main
from fluxc.tiny_folder import CONTEXT, save_tiny_model
from fluxc.toy_flux import flux_of

TEXT = "The moon is bright and the water is cold. " * 12
LAYERS = 3


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model.flux with a tokenizer and routers of random weights (sink 4, window 12)."""
    base = tmp_path_factory.mktemp("flux")
    captured = capture(save_tiny_model(base / "tiny-llama", layers=LAYERS))
    flux_of(base / "tiny.flux", captured.program, captured.meta, tokenizer_files=captured.tokenizer_files)
    return str(base / "tiny.flux")


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["run", *argv, "--json", "--max-new-tokens", "2"]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_report_has_strip_scores_and_times(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", flux, "--prompt", TEXT, "--budget", "0.99", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "routes ███   █ full" in out
    assert "Ω      0.00 (asked 0.01 on average, budget 0.99)" in out
    assert "scores 0:" in out
    assert all(word in out for word in ("dense,", "routes chosen by the routers", "ideal", "bound"))


@pytest.mark.parametrize(("forced", "ratio"), [("full", 0.0), ("sparse", 1.0)])
def test_forced_routes(flux: str, forced: str, ratio: float, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, flux, "--prompt", TEXT, "--routes", forced, "--no-timing")
    assert shown["sparse_ratio"] == ratio
    assert [layer["full"] for layer in shown["layers"]] == [forced == "full"] * LAYERS
    assert shown["timing"] is None


def test_budget_and_sparse_ratio_say_the_same(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_json(capsys, flux, "--prompt", TEXT, "--budget", "0.01", "--no-timing")
    second = run_json(capsys, flux, "--prompt", TEXT, "--sparse-ratio", "0.99", "--no-timing")
    assert first["sparse_ratio"] == second["sparse_ratio"] == 1.0
    assert first["budget"] == second["budget"] == 0.01


def test_short_prompts_run_dense(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", flux, "--prompt", "Hi", "--max-new-tokens", "1", "--no-timing"]) == 0
    out = capsys.readouterr().out
    assert "below the crossover of 32 tokens the dense program runs" in out


def test_memory_and_times_are_shown(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run_json(capsys, flux, "--prompt", TEXT, "--routes", "sparse", "--no-timing")
    # One page of 64 slots a layer: 2 KV heads x (8 + 8) fp32 numbers; a sparse layer keeps sink + window = 16 of them.
    assert shown["kv_bytes"]["measured"] == LAYERS * 64 * 2 * 16 * 4
    assert shown["kv_bytes"]["planned"] == LAYERS * 16 * 2 * 16 * 4
    assert shown["kv_bytes"]["peak"] > shown["kv_bytes"]["measured"]
    assert shown["first_token_seconds"] > 0
    assert len(shown["token_seconds"]) == len(shown["tokens"]) - 1 == 1
    assert main(["run", flux, "--prompt", TEXT, "--no-timing", "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "s to the first token," in out
    assert "ms for each further one" in out
    assert "in pages" in out


def test_tokens_are_drawn_where_a_temperature_asks_for_it(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [flux, "--prompt", TEXT, "--no-timing", "--temperature", "3"]
    one, same, other = (run_json(capsys, *argv, "--seed", seed)["tokens"] for seed in ("1", "1", "2"))
    greedy = run_json(capsys, flux, "--prompt", TEXT, "--no-timing")["tokens"]
    assert one == same
    assert len({tuple(one), tuple(other), tuple(greedy)}) == 3


def test_prompt_from_a_file_and_from_stdin(
    flux: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text(TEXT)
    from_file = run_json(capsys, flux, "--prompt-file", str(tmp_path / "prompt.txt"), "--no-timing")
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    from_stdin = run_json(capsys, flux, "--prompt-file", "-", "--no-timing")
    assert from_file["tokens"] == from_stdin["tokens"]
    assert from_file["prompt_tokens"] > 32


def test_quiet_prints_the_answer_alone(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prompt", TEXT, "--no-timing", "--max-new-tokens", "2"]
    answer = run_json(capsys, flux, "--prompt", TEXT, "--no-timing")["answer"]
    assert main(["run", flux, "-q", *argv]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (answer + "\n", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give the prompt with --prompt or with --prompt-file"),
        (["--prompt", "a", "--prompt-file", "b"], "give the prompt with --prompt or with --prompt-file"),
        (["--prompt-file", "missing.txt"], "the prompt file missing.txt does not exist"),
        (["--prompt", "word " * CONTEXT], f"leaves no room for an answer in a context of {CONTEXT}"),
        (["--prompt", "a", "--budget", "1.5"], "--budget 1.5 is outside 0..1"),
        (["--prompt", "a", "--budget", "nan"], "--budget nan is outside 0..1"),
        (["--prompt", "a", "--budget", "0.2", "--sparse-ratio", "0.8"], "say the same thing"),
        (["--prompt", "a", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p 1.5 is not a number above 0 and at most 1"),
        (["--prompt", "a", "--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_options(flux: str, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", flux, *argv, "-q"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_what_is_no_flux_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path), "--prompt", "a", "-q"]) == 2
    assert "is no model.flux directory" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.flux"), "--prompt", "a", "-q"]) == 2
    assert "none.flux does not exist" in capsys.readouterr().err


def test_a_damaged_flux_folder(flux: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    damaged = tmp_path / "damaged.flux"
    shutil.copytree(flux, damaged)
    (damaged / "plan.json").write_text("{}")
    assert main(["run", str(damaged), "--prompt", "a", "-q"]) == 2
    assert "plan.json" in capsys.readouterr().err
