"""The benchmark at a model's shape: every row is there and consistent, deadlines and failures leave the others."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxc.bench import shape as command
from fluxc.bench import shape_check, shape_prefill
from fluxc.bench.shape import SECTIONS, TINY, measured
from fluxc.bench.shape_attention import attention_seconds
from fluxc.bench.shape_decode import Decodes, decode_row, pool_for
from fluxc.bench.shape_model import RandomModel, random_model, shape_of
from fluxc.bench.shape_prefill import Prefills, Took, against_dense, compared
from fluxc.bench.shape_rows import Rows, rounds
from fluxc.bench.shape_transformers import WARM_STEPS, random_transformers, transformers_row
from fluxc.cli.app import run as run_frame
from fluxc.engine.decode_batch import DecodeBatch
from fluxc.errors import DataError, OptionError, SelfCheckError
from fluxc.runtime.measure import bound, ideal

QUICK = dataclasses.replace(TINY, lengths=(90,), decode_lengths=(70,), sweep=(16, 40), overhead_length=50, repeats=1)


@pytest.fixture(scope="module")
def model() -> RandomModel:
    return random_model(shape_of("tiny"), "cpu")


def forever() -> float:
    return math.inf


def test_the_model_is_what_loading_gives(model: RandomModel) -> None:
    shape = shape_of("tiny")
    assert [layer.routable for layer in model.programs.layers] == [True] * shape.layers
    assert (model.programs.dtype, model.programs.vocabulary) == (torch.bfloat16, shape.vocabulary)
    assert {(x.kind, x.sink, x.window) for x in model.plan.layers} == {("streaming", 4, 28)}
    names = set(model.programs.decode_graph.state_dict())
    assert any("q_proj_and_k_proj_and_v_proj" in name for name in names), "projections are merged"
    assert any("gate_proj_and_up_proj" in name for name in names)
    weights = [t for name, t in model.programs.decode_graph.state_dict().items() if t.dim() == 2]
    assert all(float(t.float().std()) == pytest.approx(0.02, rel=0.2) for t in weights)


def test_the_large_shape_has_the_size_of_qwen3_8b() -> None:
    shape = shape_of("qwen3-8b")
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    per_layer = attention + 3 * shape.hidden * shape.intermediate
    assert (2 * shape.vocabulary * shape.hidden + shape.layers * per_layer) / 1e9 == pytest.approx(8.19, abs=0.01)
    with pytest.raises(OptionError, match="qwen3-8b, tiny"):
        shape_of("other")


def test_every_section_writes_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shape.json"
    options = ["--length", "90", "--decode-length", "70", "--batch", "2", "--sweep", "16", "--sweep", "40"]
    argv = ["--shape", "tiny", "--device", "cpu", "--transformers", "--fuse", "--repeats", "1", "-o", str(out)]
    assert run_frame([*argv, *options], command=command.shape, name="shape") == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    rows = {row["section"]: row for row in found["rows"]}
    assert set(rows) == {"model", *SECTIONS}
    assert [row["name"] for row in found["rows"] if "error" in row] == []
    assert found["conditions"]["label"] == "random weights, speed only"
    assert rows["check"]["all_full"] <= rows["check"]["tolerance"] < rows["check"]["half_to_full"]
    assert rows["chosen"]["same"] is True
    assert rows["model"]["fuse"] is True
    assert rows["crossover"]["served"][0]["runs"] in ("dense again", "routed")
    assert all(word in printed for word in ("of bound", "crossover at", "device ms", "chosen_over_forced"))


def test_prefill_stands_beside_bound_and_ideal(model: RandomModel) -> None:
    row = against_dense(model, 200, (0.5, 1.0), repeats=2, most_seconds=math.inf, left=forever)
    half, sparse = row["routed"]
    assert (half["sparse_ratio"], sparse["sparse_ratio"]) == (0.5, 1.0)
    assert row["dense"] == min(run["seconds"] for run in row["runs"]["dense"])
    assert 0 < row["attention"] < row["dense"]
    assert half["bound"] == pytest.approx(bound(row["dense"], row["attention"], 0.5))
    assert half["ideal"] == pytest.approx(ideal(row["dense"], row["attention"], 0.5, row["density"]))
    assert half["of_bound"] == pytest.approx(half["speedup"] / half["bound"])
    page = 2 * 2 * 64 * 16 * 2
    assert [run["kv_bytes"] for run in row["routed"]] == [(2 * 4 + 2 * 1) * page, 4 * page]
    assert {run["routes"] for run in row["runs"]["1"]} == {"0000"}


def test_dense_that_does_not_fit_with_its_cache_runs_without(
    model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for the pool")

    monkeypatch.setattr(shape_prefill, "Runner", full)
    row = against_dense(model, 90, (1.0,), repeats=1, most_seconds=math.inf, left=forever)
    assert (row["keeps_kv"], row["pool_bytes"], row["routed"][0]["kv_bytes"]) == (False, 0, 0)
    assert "no room for the pool" in row["note"]
    assert row["routed"][0]["sparse_ratio"] == 1.0


def test_speed_ups_are_of_the_fastest_dense_run() -> None:
    slow, fast = Took(4.0, 3.0, 0, 0, [True] * 2), Took(3.0, 2.0, 0, 0, [True] * 2)
    half = Took(2.0, 0.0, 0, 0, [True, False])
    found = compared({"dense": [slow, fast], "0.5": [half]}, 0.0)
    assert (found["dense"], found["attention"]) == (3.0, 2.0)
    assert found["routed"][0]["speedup"] == pytest.approx(1.5)
    assert found["routed"][0]["of_bound"] == pytest.approx(1.0)


def test_decode_takes_the_batch_that_fits(model: RandomModel) -> None:
    one = pool_for(model, [300], [1], 3)
    assert pool_for(model, [300], [3], 3) == 3 * one
    row = decode_row(Decodes(model, 2 * one), 300, 3, (0.5, 1.0), steps=3, repeats=1, left=forever)
    assert (row["asked_batch"], row["batch"]) == (3, 2)
    assert "3 sequences all full do not fit the device: 2 do" in row["note"]
    half, sparse = row["routed"]
    assert row["dense"]["kv_bytes"] > half["kv_bytes"] > sparse["kv_bytes"] > 0
    assert half["bound"] == pytest.approx(bound(row["dense"]["step"]["median"], row["dense"]["attention"], 0.5))
    assert [(run["name"], run["batch"]) for run in row["larger"]] == [("0.5", 3), ("1", 3)]


def test_opened_sequences_decode_as_prefilled_ones_would(model: RandomModel) -> None:
    """Every slot a step reads is one of its own pages, and lies in the part that holds values."""
    decodes = Decodes(model, pool_for(model, [300], [2], 3))
    assert bool(decodes.runner.cache.isfinite().all())
    sequences = decodes.open([True, False, True, False], 300, 2)
    _, positions, slots, _, lens = DecodeBatch(sequences).inputs(sequences)
    assert positions.tolist() == [[300], [300]]
    assert lens.tolist() == [[301, 301], [32, 32], [301, 301], [32, 32]]
    assert len(set(slots.flatten().tolist())) == slots.size
    used = [page for s in sequences for page in s.holding.numbers()]
    assert len(set(used)) == len(used) == decodes.pool.used
    decodes.close(sequences)
    assert decodes.pool.used == 0
    with pytest.raises(DataError, match="3 sequences of 300 tokens do not fit"):
        decodes.open([True] * 4, 300, 3)
    assert decodes.pool.used == 0


def test_attention_of_a_step_is_found(model: RandomModel) -> None:
    decodes = Decodes(model, pool_for(model, [100], [1], 3))
    sequences = decodes.open([True] * 4, 100, 1)
    arrays = [torch.from_numpy(x) for x in DecodeBatch(sequences).inputs(sequences)]
    inputs = [*arrays[:2], decodes.runner.cache, *arrays[2:]]
    assert attention_seconds(model.programs.decode_graph, inputs, "cpu") > 0


def test_a_red_check_is_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_check, "_difference", lambda *_: math.nan)
    rows = list(measured(Rows({}, None, 0.0, "cpu"), "tiny", "cpu", QUICK, SECTIONS))
    assert [row["section"] for row in rows] == ["model", "check"]
    assert SelfCheckError.__name__ in rows[-1]["error"]


def test_a_row_that_fails_leaves_the_others(tmp_path: Path) -> None:
    rows = Rows({"seed": 1}, tmp_path / "rows.json", 0.0, "cpu")
    rows.take("a", "fails", lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    rows.take("b", "works", lambda: {"value": 3})
    found = json.loads((tmp_path / "rows.json").read_text())
    first, second = found["rows"]
    assert "ZeroDivisionError" in first["error"]
    assert any("1 // 0" in line for line in first["trace"])
    assert (second["value"], "error" in second) == (3, False)


def test_a_prompt_that_would_pass_the_deadline_is_not_begun(model: RandomModel) -> None:
    rows = Rows({}, None, 60.0, "cpu")
    rows.found["rows"].append({"section": "prefill", "length": 10, "dense": 1.0})
    work = dataclasses.replace(QUICK, lengths=(10, 20, 100))
    jobs = [job for job in command._jobs(model, work, ("prefill",), rows) if "100" in job[1]]
    assert "it needs 150 s" in jobs[0][2]()["error"]


def test_after_the_deadline_nothing_begins() -> None:
    rows = Rows({}, None, 1e-9, "cpu")
    assert "not begun" in rows.take("a", "late", lambda: {"value": 3})["error"]


def test_rounds_turn_and_end_in_time() -> None:
    order: list[str] = []
    taken = rounds(["a", "b"], lambda name: order.append(name) or name, repeats=2, left=forever, warm=["b"])
    assert order == ["b", "a", "b", "b", "a"]
    assert taken == {"a": ["a", "a"], "b": ["b", "b"]}
    assert rounds(["a"], lambda name: name, repeats=3, left=forever, most_seconds=0.0) == {"a": ["a"]}
    left = iter([1.0, -1.0])
    assert rounds(["a", "b"], lambda name: name, repeats=1, left=lambda: next(left)) == {"a": ["a"]}


def test_without_a_dense_run_there_is_no_speed_up(model: RandomModel) -> None:
    row = against_dense(model, 90, (1.0,), repeats=1, most_seconds=math.inf, left=lambda: -1.0)
    assert "no time was left" in row["error"]
    assert "routed" not in row


def test_prefills_give_their_pages_back(model: RandomModel) -> None:
    prefills = Prefills(model, 90)
    for _ in range(3):
        assert prefills.run(model.bias([True] * 4)).kv_bytes == prefills.pool_bytes
    assert prefills.run(model.bias([True] * 4), dense=True).attention > 0


def test_transformers_decodes_the_same_shape() -> None:
    shape = shape_of("tiny")
    model = random_transformers(shape, "cpu", 0)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert float(model.model.rotary_emb.inv_freq[0]) == 1.0
    row = transformers_row(shape, "cpu", 40, 3)
    assert (row["step"]["runs"], row["compiled"]) == (3, False)
    assert row["first_token"] > 0
    assert WARM_STEPS > 3
