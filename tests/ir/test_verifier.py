"""Each rule of each stage: a valid program passes, a broken one is named, all faults at once."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch

from fluxc import kernels
from fluxc.errors import InternalError, VerifierError
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.verifier import CHECKS, problems, verify
from fluxc.passes.append_turn import AppendTurn
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.insert_kv_cache import InsertKVCache
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.lower_to_cond import LowerToCond
from fluxc.passes.soften_conditionals import SoftenConditionals
from fluxc.testing import ToyConfig, toy_inputs, toy_module

kernels.register()
CONFIG = ToyConfig(windows=(0, 6, 0))
aten = torch.ops.aten


@pytest.fixture(scope="module")
def programs(toy, toy_routed):
    """A valid program of each stage."""
    captured, routed = toy(CONFIG), toy_routed(CONFIG)
    return {
        "captured": captured,
        "scored": InsertRouters().apply(captured).program,
        "routed": routed,
        "softened": SoftenConditionals().apply(routed).program,
        "lowered": LowerToCond().apply(routed).program,
        "prefill": ExposeKV().apply(routed).program,
        "decode": InsertKVCache().apply(captured).program,
        "append": AppendTurn().apply(captured).program,
    }


def _edited(program, edit):
    draft = Draft(program)
    edit(draft)
    return draft.close()


def _node(draft, name):
    return next(node for node in draft.graph.nodes if node.name == name)


@pytest.mark.parametrize("stage", CHECKS)
def test_valid_program_has_no_problems(programs, stage):
    assert problems(programs[stage], stage) == []


@pytest.mark.parametrize("stage", CHECKS)
def test_stages_are_told_apart(programs, stage):
    assert all(problems(program, stage) for other, program in programs.items() if other != stage)


def test_unknown_stage():
    with pytest.raises(InternalError, match="no stage 'fused'"):
        problems(None, "fused")


def test_all_problems_at_once_with_the_pass(programs):
    def edit(draft):
        _node(draft, "attention").kwargs = {"scale": -1.0, "layer": 1}
        _node(draft, "attention_1").kwargs = {"scale": 1.0, "layer": 1, "window": -6}

    broken = _edited(programs["captured"], edit)
    with pytest.raises(VerifierError) as caught:
        verify(broken, "captured", after="some-pass")
    text = str(caught.value)
    assert "not a valid captured program after some-pass" in text
    assert "node attention_1 has scale 1.0, softcap 0.0, window out of range" in text
    assert "node attention has scale -1.0" in text
    assert "2 attentions have the layer index 1" in text


def _insert(target, *args, before="rms_norm", name=""):
    def edit(draft):
        with draft.inserting_before(_node(draft, before)):
            node = draft.graph.create_node("call_function", target, tuple(_resolve(draft, a) for a in args), name=name)
        node.meta["val"] = _node(draft, "embedding").meta["val"]
        return node

    return edit


def _resolve(draft, value):
    return _node(draft, value[1:]) if isinstance(value, str) and value.startswith("%") else value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_insert(aten._assert_tensor_metadata.default, "%embedding"), "pins the dtype and device"),
        (_insert(aten._softmax.default, "%embedding", -1, False), "the program was decomposed"),
        (
            _insert(aten.scaled_dot_product_attention.default, "%embedding", "%embedding", "%embedding"),
            "not fluxc::att",
        ),
        (_insert(aten.arange.default, 4), "counts positions itself"),
        (_insert(aten.ones_like.default, "%embedding", torch.device("meta")), "makes a tensor on meta"),
        (_insert(torch.ops.prims.neg.default, "%embedding"), "is no aten op"),
        (_insert(torch.ops.fluxc.router_pool.default, "%embedding", "%seq_lens"), "which no captured program has"),
    ],
)
def test_calls_that_do_not_belong(programs, edit, message):
    found = problems(_edited(programs["captured"], edit), "captured")
    assert len(found) == 1
    assert message in found[0]


def test_size_arithmetic_belongs(programs):
    def edit(draft):
        with draft.inserting_before(_node(draft, "rms_norm")):
            size = draft.call(aten.sym_size.int, (_node(draft, "input_ids"), 1))
            draft.call(operator.add, (size, 1), name="longer")

    assert problems(_edited(programs["captured"], edit), "captured") == []


def test_fixed_batch_and_length():
    with torch.no_grad():
        program = torch.export.export(toy_module(CONFIG), toy_inputs())
    found = problems(program, "captured")
    assert {"the batch is fixed at 2", "the length is fixed at 24"} <= set(found)


def test_routable_attention_left_alone(programs):
    def edit(draft):
        _node(draft, "attention_1").kwargs = {"scale": 1.0, "layer": 1}

    found = problems(_edited(programs["routed"], edit), "routed")
    assert found == ["node attention_1 (layer 1) is routable and not routed"]


def test_router_without_a_weight(programs):
    program = programs["routed"]
    half = torch.nn.Parameter(program.state_dict["routers.0.head.0.bias"].half())
    broken = _edited(program, lambda draft: draft.state_dict.update({"routers.0.head.0.bias": half}))
    assert problems(broken, "routed") == ["the router weight routers.0.head.0.bias is torch.float16, not float32"]


def test_routes_out_of_order(programs):
    def swap(draft):
        node = _node(draft, "routes")
        node.args = (list(reversed(node.args[0])),)

    def wrong_row(draft):
        row = next(node for node in draft.graph.nodes if is_call(node, aten.select) and "route_bias" in str(node.args))
        row.args = (*row.args[:2], 1)

    assert "graph order" in problems(_edited(programs["routed"], swap), "routed")[0]
    found = problems(_edited(programs["routed"], wrong_row), "routed")
    assert found == ["node route is not score + route_bias[0] > 0"]


def test_sparse_settings_out_of_range(programs):
    def edit(draft):
        node = _node(draft, "routed_attention")
        node.kwargs = {**node.kwargs, "window": 0}

    assert "window 0" in problems(_edited(programs["routed"], edit), "routed")[0]


def test_cond_rules(programs):
    def edit(draft):
        conds = [node for node in draft.graph.nodes if is_call(node, torch.ops.higher_order.cond)]
        q, k, _ = conds[0].args[3]
        conds[0].args = (_node(draft, "route"), *conds[0].args[1:3], (q, k, k))

    found = problems(_edited(programs["lowered"], edit), "lowered")
    assert any("decides by route, which is not one bool" in problem for problem in found)
    assert any("passes a tensor twice" in problem for problem in found)


def test_branch_that_returns_its_input(programs):
    def edit(draft):
        graph = torch.fx.Graph()
        inputs = [graph.placeholder(name) for name in ("q", "k", "v")]
        for node in inputs:
            node.meta["val"] = _node(draft, "embedding").meta["val"]
        graph.output((inputs[0],))
        draft.module.full_0 = torch.fx.GraphModule({}, graph)

    found = problems(_edited(programs["lowered"], edit), "lowered")
    assert any("branch full_0 returns its own input q" in problem for problem in found)
    assert any("differ in their results" in problem for problem in found)


def test_batch_of_a_lowered_program(programs):
    broken = programs["routed"]
    assert any("the batch must be 1" in problem for problem in problems(broken, "lowered"))
    assert any("calls fluxc::routed_attention, which no lowered" in problem for problem in problems(broken, "lowered"))


def test_inputs_in_another_order(programs):
    program = programs["captured"]
    specs = [dataclasses.replace(spec) for spec in program.graph_signature.input_specs]
    draft = Draft(program)
    first, second = draft.user_input("input_ids"), draft.user_input("position_ids")
    second.append(first)
    at = len(specs) - 4
    draft.input_specs[at], draft.input_specs[at + 1] = draft.input_specs[at + 1], draft.input_specs[at]
    assert "inputs are position_ids, input_ids" in problems(draft.close(), "captured")[0]
