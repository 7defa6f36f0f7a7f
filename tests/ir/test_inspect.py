"""Records of attentions: sizes, what can be routed, where the router would read."""

from __future__ import annotations

import json

import pytest

from fluxc.ir.inspect import inspect_program
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.testing import ToyConfig

CONFIG = ToyConfig(windows=(0, 6), heads=4, kv_heads=2, softcap=20.0)


def test_captured_program(toy):
    full, windowed = inspect_program(toy(CONFIG))
    assert (full.layer, full.path, full.node) == (0, "layers.0.attn", "attention")
    assert (full.heads, full.kv_heads, full.head_dim, full.value_dim) == (4, 2, 8, 8)
    assert (full.window, full.softcap, full.sink_logits) == (0, 20.0, False)
    assert (full.routable, full.reason, full.routed, full.sparse) == (True, "", False, None)
    assert full.query_found
    assert (windowed.routable, windowed.reason) == (False, "has a window of its own, 6 tokens")


def test_routed_program(toy_routed):
    full, windowed = inspect_program(toy_routed(CONFIG))
    assert (full.routed, full.sparse["window"], windowed.routed) == (True, 4, False)
    assert full.query.endswith("is q before RoPE")
    json.dumps([full.to_dict(), windowed.to_dict()])


@pytest.mark.parametrize("which", ["kind", "full_kind"])
def test_blocks_are_shown(toy_routed, which):
    from fluxc.cli.inspect import _sparse

    blocks = {"block": 16, "stride": 4, "threshold": 0.9, "decode_full": True, which: "block"}
    program = ApplyPlan({0: SparseSettings(sink=2, window=4, **blocks)}).apply(toy_routed(CONFIG)).program
    shown = _sparse(inspect_program(program)[0].sparse)
    assert shown == ("" if which == "kind" else "streaming 2 + 4, full: ") + "block 16 threshold 0.9"


def test_query_that_is_not_found(toy):
    (record,) = inspect_program(toy(ToyConfig(windows=(0,), rope="two-sources")))
    assert (record.routable, record.query_found) == (True, False)
    assert "more than one value" in record.query
