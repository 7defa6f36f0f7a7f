"""The benchmark of models: every number is there and consistent, none without a green check; times are not judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxc.bench import frame
from fluxc.bench.compare import compare
from fluxc.bench.frame import FrameOptions, measure
from fluxc.cli import main
from fluxc.errors import DataError
from fluxc.runtime.measure import bound, ideal
from fluxc.toy_flux import toy_flux

QUICK = ("--new-tokens", "3", "--repeats", "1", "--device", "cpu", "--no-crossover")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux(tmp_path_factory.mktemp("bench") / "toy.flux").path


def test_what_is_measured_and_written(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", str(flux), "--length", "64", "--batch", "2", "--budget", "0.5", *QUICK]
    assert main(argv) == 0
    printed, found = capsys.readouterr().out, json.loads((flux.parent / "toy.bench.json").read_text())
    (prefill,), (decode,) = found["lengths"], found["decode"]
    forced, chosen = prefill["routed"]
    dense, inside = prefill["dense"]["median"], prefill["attention"]["median"]
    assert (forced["name"], forced["sparse_ratio"], chosen["name"]) == ("forced", 0.5, "chosen")
    assert forced["bound"] == pytest.approx(bound(dense, inside, 0.5))
    assert forced["ideal"] == pytest.approx(ideal(dense, inside, 0.5, prefill["density"]))
    assert (decode["batch"], decode["forced"]["sparse_ratio"]) == (2, 0.5)
    assert 0 < decode["forced"]["kv_bytes"] < decode["dense"]["kv_bytes"]
    assert decode["forced"]["speedup"] == pytest.approx(decode["dense"]["median"] / decode["forced"]["median"])
    assert found["crossover"] == 32
    assert all(found[name] > 0 for name in ("load_seconds", "prepare_seconds", "peak_bytes"))
    assert found["conditions"]["versions"]["torch"] == torch.__version__
    assert all(word in printed for word in ("of ideal", "KV dense", "peak memory", "crossover 32 tokens"))


def test_the_crossover_tells_what_a_router_costs(flux: Path) -> None:
    found = measure(flux, "cpu", FrameOptions(lengths=(40,), new_tokens=2, repeats=1))
    stored = json.loads((flux / "device.json").read_text())["entries"]
    (times,) = stored.values()
    assert found["router_length"] == times["lengths"][-1]
    assert found["router_seconds"] == pytest.approx((times["full"][-1] - times["dense"][-1]) / 2)


def test_a_red_check_gives_no_number(
    flux: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frame.torch, "equal", lambda a, b: False)
    out = tmp_path / "x.json"
    assert main(["bench", str(flux), "--length", "40", *QUICK, "-o", str(out)]) == 1
    assert "all-full prefill differs from dense; no times are shown" in capsys.readouterr().err
    assert not out.exists()


def result(seconds: float, spread: float) -> dict[str, Any]:
    times = {"median": seconds, "fastest": seconds - spread, "slowest": seconds + spread}
    runs = [{"name": "forced", "seconds": times}]
    return {"lengths": [{"length": 100, "dense": {**times, "median": 2 * seconds}, "routed": runs}]}


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, (seconds, spread) in zip(paths, ((2.0, 0.1), (1.0, 0.1), (1.9, 0.3)), strict=True):
        path.write_text(json.dumps(result(seconds, spread)))
    faster = {pair.name: pair for pair in compare(paths[0], paths[1])}
    assert (faster["prefill 100 forced"].ratio, faster["prefill 100 forced"].apart) == (2.0, True)
    assert [pair.apart for pair in compare(paths[0], paths[2])] == [False, False]
    assert main(["bench", "--compare", str(paths[0]), str(paths[2])]) == 0
    assert "within the spread" in capsys.readouterr().out
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(DataError, match="nothing in common"):
        compare(paths[0], tmp_path / "d.json")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "say what to measure; a model.flux or engine folder, or kernels"),
        (["nowhere.flux"], "nowhere.flux does not exist"),
        (["kernels", "--batch", "2"], "--batch does not go with kernels"),
        (["nowhere.flux", "--suite", "decode"], "--suite does not go with nowhere.flux"),
        (["--compare", "a.json", "b.json"], "cannot read a.json"),
    ],
)
def test_bad_options(
    argv: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argv, "-q"]) == 2
    assert said in capsys.readouterr().err
