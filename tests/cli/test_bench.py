"""`fluxc bench kernels`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxc.cli import main
from fluxc.kernels.bench import cpu


def test_times_the_ops_beside_their_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    argv = ["bench", "kernels", "--device", "cpu", "--length", "300", "--rounds", "1", "-o", str(out)]
    assert main(argv) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert {row["op"] for row in found["rows"]} >= {"attention", "streaming_attention", "decode_attention"}
    assert all(row["ms"] > 0 and row["length"] == 300 for row in found["rows"])
    assert found["conditions"]["torch"]
    for word in ("SDPA", "ours", "decode_attention", "of ideal"):
        assert word in printed


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "kernels", "--device", "cpu", "--suite", "decode", "--length", "70", "--rounds", "1", "--json"]
    assert main(argv) == 0
    assert {row["suite"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"decode"}


def test_a_red_check_gives_no_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, out = cpu._paged, tmp_path / "kernels.json"
    monkeypatch.setattr(cpu, "_paged", lambda case, step: right(case, step) + 1)
    argv = ["bench", "kernels", "--device", "cpu", "--suite", "decode", "--length", "70", "-o", str(out)]
    assert main(argv) == 1
    assert "no times are shown" in capsys.readouterr().err
    assert not out.exists()


def test_an_unknown_suite_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--device", "cpu", "--suite", "router"]) == 2
    assert "choose one of prefill, decode" in capsys.readouterr().err
