"""The benchmark at a model's shape on a GPU, with its tiny one: no row fails, and steps are replayed as graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fluxc.bench import shape as command
from fluxc.bench.shape_decode import Decodes, pool_for
from fluxc.bench.shape_model import random_model, shape_of
from fluxc.cli.app import run as run_frame

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_every_row_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "shape.json"
    argv = ["--shape", "tiny", "--device", "cuda", "--repeats", "1", "-o", str(out)]
    assert run_frame(argv, command=command.shape, name="shape") == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["error"]) for row in rows if "error" in row] == []
    prefill = next(row for row in rows if row["section"] == "prefill")
    assert 0 < prefill["attention"] < prefill["dense"]
    assert prefill["runs"]["dense"][0]["peak_bytes"] > prefill["pool_bytes"] > 0


def test_steps_and_their_attention_are_timed() -> None:
    model = random_model(shape_of("tiny"), "cuda")
    decodes = Decodes(model, pool_for(model, [200], [2], 9))
    steps = decodes.steps([True] * 4, 200, 2, 9, attention=True)
    assert len(decodes.runner.store._graphs) == 1
    assert len(steps.step) == 9
    assert 0 < steps.attention < min(steps.step)
