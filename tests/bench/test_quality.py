"""The quality benchmark on a tiny model: every suite and system has its rows, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fluxc.bench.quality as quality_module
from fluxc.bench.quality import quality
from fluxc.cli.app import run
from fluxc.tiny_folder import CONTEXT


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A transformed tiny model with the built-in prompts."""
    from fluxc.calibrate.options import CalibrateOptions
    from fluxc.calibrate.transform import transform
    from fluxc.tiny_folder import save_tiny_model

    folder = tmp_path_factory.mktemp("model")
    options = CalibrateOptions(effort="quick", sparse_kind="streaming", sink=4, window=32)
    return str(transform(save_tiny_model(folder / "tiny", layers=2), folder / "tiny.flux", options=options).path)


def test_rows_and_nestedness_of_a_suite(flux: str, tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    argv = [flux, "--suite", "needle", "--share", "0.02", "--budget", "0.6", "--budget", "0.2", "-o", str(output), "-q"]
    assert run([*argv, "--device", "cpu"], quality) == 0
    found = json.loads(output.read_text())
    rows = found["suites"]["needle"]
    systems = {row["system"] for row in rows}
    assert {"dense", "all sparse", "every second layer", "fluxc 0.2", "fluxc 0.6"} < systems
    prompts = {row["prompt"] for row in rows}
    assert len(rows) == len(prompts) * len(systems)
    assert {row["routes"] for row in rows if row["system"] == "dense"} == {"11"}
    nested = found["nestedness"]["needle"]
    assert (nested["of"], len(nested["steps"])) == (2 * len(prompts), 1)


def test_a_suite_longer_than_the_context(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([flux, "--suite", "text", "--device", "cpu", "-q"], quality) == 2
    said = f"error: the suite text has prompts of 6000 tokens, and the context is {CONTEXT}; choose other suites"
    assert capsys.readouterr().err.startswith(said)


def test_interrupted_rows_are_taken_up_again(flux: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "quality.json"
    argv = [flux, "--suite", "needle", "--share", "0.02", "--budget", "0.6", "-o", str(output), "-q", "--device", "cpu"]
    assert run([*argv, "--system", "fluxc*"], quality) == 0
    whole, ran = json.loads(output.read_text()), []
    calls = quality_module.run_biases

    def interrupted(*call: Any) -> Any:
        ran.append(call)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return calls(*call)

    monkeypatch.setattr(quality_module, "run_biases", interrupted)
    assert run([*argv, "--system", "fluxc*"], quality) == 130
    assert run([*argv, "--system", "fluxc*"], quality) == 0
    assert len(ran) == len(whole["suites"]["needle"]) + 1
    assert json.loads(output.read_text())["suites"] == whole["suites"]
    assert not output.with_name("quality.json.rows").exists()


def test_an_unknown_system_is_refused(flux: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([flux, "--suite", "needle", "--system", "magic", "--device", "cpu", "-q"], quality) == 2
    assert "no system is called magic; these are: dense, every second layer, all sparse" in capsys.readouterr().err
