"""An engine directory scores as the model it was exported from. Export takes half a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxc.evaluate.evaluation import Evaluation
from fluxc.evaluate.options import EvalOptions
from fluxc.evaluate.store import Store
from fluxc.evaluate.subjects import EngineSubject, FluxSubject, open_subject


@pytest.mark.slow
def test_an_onnx_engine_scores_as_its_model(subject: FluxSubject, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from fluxc.bench.frame import FrameOptions, measure
    from fluxc.exporters.export import export

    export(folder / "tiny.flux", target="onnx", output=tmp_path / "engine")
    engine = open_subject(tmp_path / "engine", "cpu")
    assert isinstance(engine, EngineSubject)
    options = EvalOptions(suites=("needle", "text"), count=2, budgets=(0.5,), lengths=(400,))
    mine, other = (Evaluation(one, options, Store(None, one.digest)).run() for one in (engine, subject))
    by_name = {(row["suite"], row["prompt"], row["system"]): row for row in other["rows"]}
    for row in mine["rows"]:
        expected = by_name[row["suite"], row["prompt"], row["system"]]
        assert (row["routes"], row["exact"]) == (expected["routes"], expected["exact"])
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-4)

    timed = measure(tmp_path / "engine", "cpu", FrameOptions(lengths=(300,), new_tokens=3, repeats=1))
    assert timed["lengths"][0]["routed"][0]["speedup"] > 0
    assert timed["decode"][0]["forced"]["kv_bytes"] <= timed["decode"][0]["dense"]["kv_bytes"]
