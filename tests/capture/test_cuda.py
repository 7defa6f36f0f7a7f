"""A model on a GPU is captured there; a capture made on the CPU moves there by the pass `place` alone."""

from __future__ import annotations

import pytest
import torch

import fluxc
from fluxc.ir.graph import runnable
from fluxc.passes.place import Place
from fluxc.testing import TINY_FAMILIES
from fluxc.tiny_models import VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(length: int) -> tuple[torch.Tensor, ...]:
    ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    positions = torch.arange(length).expand(2, length).contiguous()
    return tuple(x.cuda() for x in (ids, positions, torch.tensor([length, length]), positions))


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "gemma2", "qwen3-moe", "gpt-oss", "opt"])
def test_captured_where_it_is(name: str) -> None:
    model = TINY_FAMILIES[name]().cuda()
    program = fluxc.capture(model).program
    assert {t.device.type for t in (*program.state_dict.values(), *program.constants.values())} == {"cuda"}
    ids, positions, *_ = inputs(21)
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(runnable(program)(*inputs(21)), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_placed_afterwards(name: str, dtype: str) -> None:
    program = fluxc.capture(TINY_FAMILIES[name](), dtype=dtype).program
    here = runnable(program)(*(x.cpu() for x in inputs(21))).float()
    there = runnable(Place("cuda").apply(program).program)(*inputs(21)).float().cpu()
    tolerance = 1e-3 if dtype == "float32" else 0.1 * here.abs().max().item()
    assert (here - there).abs().median() < tolerance
