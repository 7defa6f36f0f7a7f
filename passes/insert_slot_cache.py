"""Pass `insert-slot-cache`: the decode program for runtimes without our ops, with one cache tensor a layer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument
from fluxc.ir.kv import add_inputs, free_size, of_layer, remove_unread
from fluxc.ir.layers import attention_nodes
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sizes import fix_size
from fluxc.passes.insert_kv_cache import drop_length_of_logits, keep_all_rows

aten = torch.ops.aten
_LOWEST = -1e30  # not -inf: a request of no slots then gives finite values instead of NaN


@dataclasses.dataclass(frozen=True)
class InsertSlotCache(Pass):
    """Scatter each key and value into its slot of the layer's cache, then attend over the valid slots.

    1. Caches k_cache_a, v_cache_a [B,Hk,C,D] come in and go out as k_cache_a_out, v_cache_a_out; C differs per layer.
    2. slots i64[A,B], lens i32[A,B] as in `insert-kv-cache`, but slots count within a request's own row of the cache.
       A request that takes no part still needs a slot to write to: any slot past its lens.
    3. The length becomes 1 and `logits_at` goes, as in `insert-kv-cache`.

        %out = attention(%q, %k, %v)       %k_out = scatter(%k_cache_a, 2, %slots[a], %k), the same for v
        return %logits                =>   %out = softmax(%q @ %k_out.T where slot < %lens[a]) @ %v_out
                                           return %logits[:, 0], %k_out, %v_out, ...

    Only ATen ops are put in. Raises UnsupportedAttentionError as `insert-kv-cache` does.
    """

    name: ClassVar[str] = "insert-slot-cache"
    runs_after: ClassVar[tuple[str, ...]] = ("drop-routers", "rope-per-request", "set-dtype", "place")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions that read from a cache."""
        kernels.register()
        inputs = add_inputs(draft, ("slots", "lens"))
        attentions = attention_nodes(draft.graph)
        caches = [_caches(draft, node, index) for index, node in enumerate(attentions)]
        fix_size(draft, draft.user_input("input_ids"), 1, 1)
        fix_size(draft, draft.user_input("logits_at"), 1, 1)
        _drop_length(draft, inputs["slots"])
        written = [
            part for index, node in enumerate(attentions) for part in _decode(draft, node, index, inputs, caches[index])
        ]
        remove_unread(draft, "seq_lens")
        keep_all_rows(draft)
        remove_unread(draft, "logits_at")
        drop_length_of_logits(draft)
        outputs: Any = draft.output.args[0]
        draft.set_outputs([*outputs, *written])
        return len(attentions)


def _caches(draft: Draft, node: Node, index: int) -> dict[str, Node]:
    """Case 1: the inputs of one layer."""
    slots = free_size(draft)
    caches = {}
    for name in "kv":
        like = argument(node, name).meta["val"]
        with draft.fake_mode:
            val = torch.empty(like.shape[0], like.shape[1], slots, like.shape[3], dtype=like.dtype, device=like.device)
        caches[name] = draft.add_input(f"{name}_cache_{index}", val)
    return caches


def _drop_length(draft: Draft, slots: Node) -> None:
    with draft.fake_mode:
        slots.meta["val"] = torch.empty_like(slots.meta["val"][:, :, 0])


def _decode(draft: Draft, node: Node, index: int, inputs: dict[str, Node], caches: dict[str, Node]) -> list[Node]:
    """Put the step of one layer in; returns the caches as they are after it."""
    with draft.inserting_before(node):
        slot = draft.call(aten.view.default, (of_layer(draft, inputs["slots"], index), [-1, 1, 1, 1]))
        written = [
            _scatter(draft, caches[name], argument(node, name), slot, f"{name}_cache_{index}_out") for name in "kv"
        ]
        seen = _seen(draft, written[0], of_layer(draft, inputs["lens"], index))
        out = _attend(draft, node, written[0], written[1], seen)
    node.replace_all_uses_with(out)
    draft.graph.erase_node(node)
    return written


def _scatter(draft: Draft, cache: Node, rows: Node, slot: Node, name: str) -> Node:
    _, heads, _, width = cache.meta["val"].shape
    index = draft.call(aten.expand.default, (slot, [-1, heads, 1, width]))
    return draft.call(aten.scatter.src, (cache, 2, index, rows), name=name)


def _seen(draft: Draft, cache: Node, lens: Node) -> Node:
    """bool[B,1,1,C]: the valid slots."""
    slots = draft.call(aten.sym_size.int, (cache, 2))
    numbers = draft.call(
        aten.arange.default, (slots,), {"dtype": torch.int32, "device": cache.meta["val"].device, "pin_memory": False}
    )
    return draft.call(aten.lt.Tensor, (numbers, draft.call(aten.view.default, (lens, [-1, 1, 1, 1]))))


def _attend(draft: Draft, node: Node, k: Node, v: Node, seen: Node) -> Node:
    """Attention [B,1,H,D] of one query over the slots that are seen; query heads stand grouped by their key head."""
    q, softcap, sinks = argument(node, "q"), argument(node, "softcap"), argument(node, "sink_logits")
    heads, width, groups = q.meta["val"].shape[1], q.meta["val"].shape[3], k.meta["val"].shape[1]
    grouped = draft.call(aten.reshape.default, (q, [-1, groups, heads // groups, width]))
    scaled = draft.call(aten.mul.Tensor, (grouped, argument(node, "scale")))
    scores = draft.call(aten.matmul.default, (scaled, draft.call(aten.transpose.int, (k, 2, 3))))
    if softcap:
        small = draft.call(aten.tanh.default, (draft.call(aten.div.Tensor, (scores, softcap)),))
        scores = draft.call(aten.mul.Tensor, (small, softcap))
    hidden = draft.call(aten.bitwise_not.default, (seen,))
    scores = draft.call(aten.masked_fill.Scalar, (scores, hidden, _LOWEST))
    weights = _softmax(draft, scores, sinks)
    out = draft.call(aten.matmul.default, (weights, v))
    return draft.call(aten.reshape.default, (out, [-1, 1, heads, width]))


def _softmax(draft: Draft, scores: Node, sinks: Node | None) -> Node:
    """Weights of the slots; sink logits take weight and carry no value."""
    if sinks is None:
        return draft.call(aten.softmax.int, (scores, -1))
    groups, each = scores.meta["val"].shape[1:3]
    column = draft.call(aten.view.default, (sinks, [1, groups, each, 1]))
    typed = draft.call(aten.to.dtype, (column, scores.meta["val"].dtype))
    first = draft.call(aten.slice.Tensor, (scores, 3, 0, 1))
    column = draft.call(aten.expand_as.default, (typed, first))
    weights = draft.call(aten.softmax.int, (draft.call(aten.cat.default, ([scores, column], -1)), -1))
    return draft.call(aten.slice.Tensor, (weights, 3, 0, -1))
