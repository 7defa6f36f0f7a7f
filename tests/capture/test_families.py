"""Every family: the captured program computes the logits of the original model under eager attention."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import fluxc
from fluxc.ir.graph import argument, calls, runnable, user_inputs
from fluxc.signature import CAPTURED_INPUTS
from fluxc.testing import TINY_FAMILIES
from fluxc.tiny_models import VOCAB, WINDOW

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# Beyond two windows and beyond the original context of the longrope model.
LENGTHS = (1, 2, 21)
WINDOWED = ("gemma2", "gemma3", "gpt-oss", "cohere2")


@functools.cache
def captured(name: str) -> ExportedProgram:
    return fluxc.capture(TINY_FAMILIES[name]()).program


@functools.cache
def original(name: str) -> Any:
    """The model again, over a config object of its own."""
    model = TINY_FAMILIES[name]()
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    fresh = type(model)(config).eval()
    fresh.load_state_dict(model.state_dict())
    return fresh


def tokens(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCAB, (batch, length), generator=generator)
    return ids, torch.arange(length).expand(batch, length).contiguous()


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_logits_equal_the_original(name: str) -> None:
    program = runnable(captured(name))
    for batch in (1, 3):
        for length in LENGTHS:
            ids, positions = tokens(batch, length)
            lens = torch.full((batch,), length)
            with torch.no_grad():
                want = original(name)(input_ids=ids, position_ids=positions, use_cache=False).logits
                got = program(ids, positions, lens, positions)
            torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_right_padding_does_not_reach_the_tokens(name: str) -> None:
    ids, positions = tokens(3, 21)
    lens = torch.tensor([1, 12, 21])
    mask = torch.arange(21) < lens[:, None]
    with torch.no_grad():
        padded = ids.where(mask, 0)
        want = original(name)(input_ids=padded, attention_mask=mask.long(), position_ids=positions).logits
        got = runnable(captured(name))(padded, positions, lens, positions)
    torch.testing.assert_close(got[mask], want[mask], **TOLERANCE)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_positions_come_from_position_ids(name: str) -> None:
    ids, positions = tokens(1, 9)
    positions = positions * 3 + 2
    with torch.no_grad():
        # A mask of ones keeps transformers from taking the gaps for packed sequences.
        ones = torch.ones_like(ids)
        want = original(name)(input_ids=ids, position_ids=positions, attention_mask=ones).logits
        got = runnable(captured(name))(ids, positions, torch.tensor([9]), torch.arange(9)[None])
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_normal_form(name: str) -> None:
    program = captured(name)
    attentions = calls(program, torch.ops.fluxc.attention)
    windows = [argument(node, "window") for node in attentions]
    assert user_inputs(program) == CAPTURED_INPUTS
    assert windows == ([WINDOW, 0] if name in WINDOWED else [0, 0])
    assert [argument(node, "layer") for node in attentions] == [0, 1]
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("wrap_with" in t or "_assert_tensor_metadata" in t or "aten.to.device" in t for t in targets)
    assert "aten.to.dtype_layout" not in targets
    assert not any(t.startswith("aten.scaled_dot_product") for t in targets)


def test_rows_that_reach_the_head() -> None:
    ids, positions = tokens(2, 11)
    rows = torch.tensor([[10], [4]])
    program = runnable(captured("gemma2"))
    every = program(ids, positions, torch.tensor([11, 5]), positions)
    some = program(ids, positions, torch.tensor([11, 5]), rows)
    assert some.shape == (2, 1, VOCAB)
    torch.testing.assert_close(some, every.gather(1, rows[..., None].expand(-1, -1, VOCAB)), **TOLERANCE)


def test_tied_weights_are_held_once() -> None:
    assert "lm_head.weight" not in captured("llama").state_dict
    assert "lm_head.weight" in captured("llama-untied").state_dict


def test_sinks_and_soft_caps_reach_the_attention() -> None:
    sinks = [argument(node, "sink_logits") for node in calls(captured("gpt-oss"), torch.ops.fluxc.attention)]
    caps = [argument(node, "softcap") for node in calls(captured("gemma2"), torch.ops.fluxc.attention)]
    assert all(isinstance(node, torch.fx.Node) for node in sinks)
    assert caps == [50.0, 50.0]


def test_gradients_flow_through_a_capture() -> None:
    program = runnable(captured("qwen3-moe"))
    weight = dict(program.named_parameters())["model.embed_tokens.weight"].requires_grad_()
    ids, positions = tokens(1, 9)
    program(ids, positions, torch.tensor([9]), positions).square().sum().backward()
    assert weight.grad is not None and weight.grad[ids[0]].abs().min(-1).values.gt(0).any()
