"""The plan: round trips, refusals, biases between the curve's points, KV sizes worked out by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from fluxc.budget import budget_of, complement
from fluxc.errors import OptionError, PlanError
from fluxc.model_info import AttentionInfo, ModelInfo
from fluxc.plan import CurvePoint, LayerPlan, Plan

SHAPE = {"heads": 9, "kv_heads": 3, "key_dim": 64, "value_dim": 32}


def model_info(**changes) -> ModelInfo:
    """Four attentions; the one of layer 2 has a window of its own."""
    attentions = tuple(AttentionInfo(layer, window=16 if layer == 2 else 0, **SHAPE) for layer in range(4))
    return dataclasses.replace(ModelInfo("llama", 8192, "float32", "ab" * 32, attentions), **changes)


def make_plan(**changes) -> Plan:
    layers = (
        LayerPlan(0, "streaming", 4, 32),
        LayerPlan(1, "triangle", 8, 64, 16),
        LayerPlan(3, "streaming", 4, 32),
    )
    curve = (CurvePoint(0.2, (-4.0, -2.0, 0.0)), CurvePoint(0.4, (-2.0, -2.0, 1.0)), CurvePoint(0.9, (3.0, 3.0, 3.0)))
    plan = Plan(model_info(), 100, "sparse", layers, curve, 0.4, calibration={"seed": 7})
    return dataclasses.replace(plan, **changes)


def with_pins(*pins: str | None) -> Plan:
    plan = make_plan()
    layers = tuple(dataclasses.replace(layer, pin=pin) for layer, pin in zip(plan.layers, pins, strict=True))
    return dataclasses.replace(plan, layers=layers)


def test_json_round_trip_keeps_plan_and_digest():
    plan = with_pins(None, "full", "sparse")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest() == plan.digest()
    assert plan.with_budget(0.3).digest() != plan.digest()


@pytest.mark.parametrize("place", [(), ("model",), ("layers", 0), ("curve", 0), ("model", "attentions", 0)])
def test_unknown_and_missing_keys_are_refused(place):
    values = json.loads(make_plan().to_json())
    spot = values
    for step in place:
        spot = spot[step]
    spot["surprise"] = 1
    with pytest.raises(PlanError, match="surprise"):
        Plan.from_dict(values)
    del spot["surprise"]
    gone = {(): "pool", ("model",): "context", ("layers", 0): "sink", ("curve", 0): "bias"}.get(place, "kv_heads")
    del spot[gone]
    with pytest.raises(PlanError, match=gone):
        Plan.from_dict(values)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2}', '{"format": "1"}', "NaN"])
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_a_newer_format_is_named():
    values = json.loads(make_plan().to_json()) | {"format": 2}
    with pytest.raises(PlanError, match="newer"):
        Plan.from_dict(values)


@pytest.mark.parametrize(("key", "value"), [("context", "8192"), ("family", 3), ("attentions", {}), ("dtype", "int8")])
def test_values_of_the_wrong_type_are_refused(key, value):
    values = json.loads(make_plan().to_json())
    values["model"][key] = value
    with pytest.raises(PlanError, match=key):
        Plan.from_dict(values)


def test_loading_names_the_file(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": 0},
        {"decode": "ring"},
        {"budget": 0.1},
        {"curve": ()},
        {"curve": (CurvePoint(0.4, (0.0,)),)},
        {"curve": (CurvePoint(0.9, (0.0,) * 3), CurvePoint(0.4, (0.0,) * 3))},
        {"curve": (CurvePoint(0.4, (1.0,) * 3), CurvePoint(0.9, (1.0, 1.0, 0.9)))},
        {"layers": ()},
        {"layers": (LayerPlan(0, "streaming", 4, 32),)},
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(changes):
    with pytest.raises(PlanError):
        make_plan(**changes)


@pytest.mark.parametrize(
    "fields",
    [
        (0, "block", 4, 32),
        (0, "streaming", 4, 0),
        (0, "streaming", -1, 4),
        (0, "streaming", 4, 32, 8),
        (0, "triangle", 4, 32, 0),
        (0, "streaming", 4, 32, 0, "dense"),
        (0, "streaming", 4.0, 32),
        (True, "streaming", 4, 4),
    ],
)
def test_bad_layers_are_refused(fields):
    with pytest.raises(PlanError):
        LayerPlan(*fields)


@pytest.mark.parametrize("bias", [math.nan, math.inf, "1", None, True])
def test_curve_biases_are_finite_numbers(bias):
    with pytest.raises(PlanError):
        CurvePoint(0.5, (bias,))


def test_bias_meets_the_curve_and_is_linear_between():
    plan = make_plan()
    assert plan.bias() == plan.bias(0.4) == [-2.0, -2.0, 1.0]
    assert plan.bias(0.2) == [-4.0, -2.0, 0.0]
    assert plan.bias(0.9) == [3.0, 3.0, 3.0]
    assert plan.bias(0.3) == pytest.approx([-3.0, -2.0, 0.5])
    assert plan.bias(0.65) == pytest.approx([0.5, 0.5, 2.0])


def test_bias_at_the_ends_and_with_pins():
    plan = with_pins("full", None, "sparse")
    assert make_plan().bias(0) == [-math.inf] * 3
    assert make_plan().bias(1) == [math.inf] * 3
    assert plan.bias(0) == [math.inf, -math.inf, -math.inf]
    assert plan.bias(1) == [math.inf, math.inf, -math.inf]
    assert plan.bias(0.4) == [math.inf, -2.0, -math.inf]


def test_bias_never_falls_as_the_budget_grows():
    curve = (CurvePoint(0.0, (0.1, -1e9, -0.3)), CurvePoint(0.31, (0.1, 1e-9, 0.3)), CurvePoint(1.0, (0.1, 1e9, 0.3)))
    plan = make_plan(curve=curve)
    rows = [plan.bias(step / 997) for step in range(998)]
    for low, high in itertools.pairwise(rows):
        assert all(a <= b for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("budget", [-0.1, 1.1, math.nan, math.inf, "0.4", True, 0.19, 0.95])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(PlanError):
        make_plan().bias(budget)


def test_route_bias_tensor_has_one_column_a_request():
    plan = make_plan()
    bias = plan.route_bias(batch=2)
    assert bias.dtype == torch.float32
    assert bias.shape == (3, 2)
    assert bias[:, 0].tolist() == bias[:, 1].tolist() == [-2.0, -2.0, 1.0]
    mixed = plan.route_bias([0, 0.9], batch=2)
    assert mixed[:, 0].tolist() == [-math.inf] * 3
    assert mixed[:, 1].tolist() == [3.0] * 3
    with pytest.raises(PlanError):
        plan.route_bias([0.4], batch=2)


def test_what_was_verified_stays_with_its_budget():
    plan = make_plan(achieved={"0.4": {"full_share": 0.39}})
    assert plan.with_budget(0.4) is plan
    other = plan.with_budget(0.3)
    assert other.achieved_at() == {}
    assert other.achieved_at(0.4) == other.with_budget(0.4).achieved_at() == {"full_share": 0.39}
    with pytest.raises(PlanError):
        plan.with_budget(0.05)


def test_kv_slots_and_bytes_by_hand():
    plan = make_plan()
    # A token of one layer: 3 heads x (64 + 32) numbers x 4 bytes = 1152 bytes. Layer 2 is a ring of 16.
    assert plan.kv_slots([True, True, True], 1000) == {0: 1000, 1: 1000, 2: 16, 3: 1000}
    assert plan.kv_slots([False, False, True], 1000) == {0: 36, 1: 72, 2: 16, 3: 1000}
    assert plan.kv_slots([False, False, False], 20) == {0: 20, 1: 20, 2: 16, 3: 20}
    assert plan.kv_bytes([False, False, True], 1000) == (36 + 72 + 16 + 1000) * 1152
    full = make_plan(decode="full")
    assert full.kv_bytes([False, False, False], 1000) == (3 * 1000 + 16) * 1152
    half = make_plan(model=model_info(dtype="bfloat16"))
    assert half.kv_bytes(torch.tensor([False, False, True]), 1000) == (36 + 72 + 16 + 1000) * 576
    with pytest.raises(PlanError):
        plan.kv_slots([True], 1000)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"family": "qwen3"}, "family"),
        ({"context": 4096}, "context"),
        ({"weights": "cd" * 32}, "weights"),
        ({"dtype": "float16"}, "dtype"),
        ({"attentions": model_info().attentions[:3]}, "3 of these"),
    ],
)
def test_a_plan_of_another_model_is_refused(change, word):
    make_plan().check_model(model_info())
    with pytest.raises(PlanError, match=word):
        make_plan().check_model(model_info(**change))


def test_values_that_are_no_json_are_refused():
    with pytest.raises(PlanError):
        make_plan(achieved={"full_share": math.nan}).digest()


def test_budget_and_sparse_ratio_say_the_same():
    assert budget_of(0.4, None) == budget_of(None, 0.6) == 0.4
    assert budget_of(None, 0.7) == 0.3
    assert budget_of(None, None) is None
    assert complement(0.27) == 0.73
    for wrong in ((0.4, 0.6), (1.2, None), (None, -0.1), (math.nan, None)):
        with pytest.raises(OptionError):
            budget_of(*wrong)


def test_only_layers_of_blocks_name_their_sizes():
    blocks = LayerPlan(3, "block", 4, 32, block=16, stride=2, threshold=0.9)
    plan = make_plan(decode="full", layers=(*make_plan().layers[:2], blocks))
    assert Plan.from_json(plan.to_json()) == plan
    assert ["block" in layer for layer in plan.to_dict()["layers"]] == [False, False, True]
    assert blocks.settings(decode_full=True).block == 16


def test_a_full_kind_is_named_only_where_it_is_not_dense():
    blocks = LayerPlan(3, "streaming", 4, 32, block=16, stride=2, threshold=0.9, full_kind="block")
    plan = make_plan(layers=(*make_plan().layers[:2], blocks))
    assert Plan.from_json(plan.to_json()) == plan
    layers = plan.to_dict()["layers"]
    assert [layer.get("full_kind") for layer in layers] == [None, None, "block"]
    assert blocks.settings(decode_full=False).full_kind == "block"
    assert plan.kv_slots([True] * 3, 100) == make_plan().kv_slots([True] * 3, 100)
    assert {layer.full_kind for layer in Plan.from_dict(make_plan().to_dict()).layers} == {"dense"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_kind": "block"}, "both block"),
        ({"full_kind": "sparse"}, "full kind 'sparse' is not dense or block"),
        ({"kind": "streaming"}, "block 16 with kind 'streaming'"),
        ({"kind": "streaming", "full_kind": "block", "block": 0}, "kind 'streaming' and full kind 'block'"),
        ({"block": 0}, "block 0 with kind 'block'"),
        ({"block": 24}, "block 24, stride 2 cannot be used"),
        ({"threshold": 0.0}, "block threshold is 0.0"),
    ],
)
def test_blocks_that_cannot_be(changes, message):
    with pytest.raises(PlanError, match=message):
        sizes = {"kind": "block", "block": 16, "stride": 2, "threshold": 0.9} | changes
        LayerPlan(3, sink=4, window=32, **sizes).settings(decode_full=True)
