"""RoPE kinds on both sides of the original context (16 tokens), in one program each."""

from __future__ import annotations

import functools

import pytest
import torch

import fluxc
from fluxc.capture.refuse import refuse_unsupported
from fluxc.errors import CaptureError
from fluxc.ir.graph import calls, runnable
from fluxc.testing import tiny_llama_rope
from fluxc.tiny_models import VOCAB

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
SIDES = {"inside": 15, "last inside": 16, "first outside": 17, "outside": 60}


@functools.cache
def captured(kind: str) -> torch.nn.Module:
    return runnable(fluxc.capture(tiny_llama_rope(kind)).program)


@pytest.mark.parametrize("length", SIDES.values(), ids=SIDES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, length: int) -> None:
    ids = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    positions = torch.arange(length).expand(2, length).contiguous()
    with torch.no_grad():
        # A fresh model: longrope remembers its last call.
        want = tiny_llama_rope(kind)(input_ids=ids, position_ids=positions).logits
        got = captured(kind)(ids, positions, torch.tensor([length] * 2), positions)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_longrope_has_two_tables() -> None:
    """The comparison above would pass on one table if both were the same."""
    ids = torch.arange(16)[None]
    inside, outside = torch.arange(16)[None], torch.arange(1, 17)[None]
    run = captured("longrope")
    same = captured("yarn")
    rows, lens = torch.arange(16)[None], torch.tensor([16])
    assert (run(ids, inside, lens, rows) - run(ids, outside, lens, rows)).abs().max() > 1e-2
    assert (same(ids, inside, lens, rows) - same(ids, outside, lens, rows)).abs().max() < 1e-4


def test_longrope_chooses_in_the_graph() -> None:
    program = fluxc.capture(tiny_llama_rope("longrope")).program
    assert len(calls(program, torch.ops.aten.where)) == 1
    assert not any("copy_" in str(node.target) for node in program.graph.nodes)


def test_dynamic_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match="'dynamic' cannot be captured"):
        refuse_unsupported(tiny_llama_rope("dynamic"))
