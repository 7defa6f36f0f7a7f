"""`fluxc calibrate` changes the budget in the plan, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxc.cli import main
from fluxc.flux_dir import open_flux
from fluxc.toy_flux import toy_flux


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux(tmp_path_factory.mktemp("made") / "toy.flux").path


@pytest.fixture
def flux(made: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(made, tmp_path / "toy.flux")


def contents(flux: Path) -> dict[str, bytes]:
    return {str(path.relative_to(flux)): path.read_bytes() for path in flux.rglob("*") if path.is_file()}


def test_only_the_plan_and_its_digest_change(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(flux)
    assert main(["calibrate", str(flux), "--budget", "0.3"]) == 0
    assert "from budget 0.4 (Ω 0.6) to budget 0.3 (Ω 0.7)" in capsys.readouterr().out
    after = contents(flux)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"plan.json", "manifest.json"}
    assert open_flux(flux).plan.budget == 0.3


def test_there_and_back_is_the_same_budget(flux: Path) -> None:
    bias = open_flux(flux).plan.bias()
    for ratio in ("0.9", "0.6"):
        assert main(["calibrate", str(flux), "--sparse-ratio", ratio, "-q"]) == 0
    assert open_flux(flux).plan.bias() == bias


def test_dry_run_changes_nothing(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(flux)
    assert main(["calibrate", str(flux), "--budget", "0.3", "-n", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"flux": str(flux), "dry_run": True, "before": 0.4, "after": 0.3}
    assert contents(flux) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "say which budget"),
        (["--budget", "2"], "--budget 2 is outside 0..1"),
        (["--budget", "0.005"], "outside what this plan was calibrated for"),
    ],
)
def test_bad_budgets(flux: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(flux)
    assert main(["calibrate", str(flux), *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert contents(flux) == before


def test_what_is_no_flux_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(tmp_path / "none.flux"), "--budget", "0.3"]) == 2
    assert "none.flux does not exist" in capsys.readouterr().err
