"""Pass `insert-kv-cache`: turns a captured program into the decode program, one token a request and call."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.kv import add_inputs, of_layer, remove_unread
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import walk_back
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sizes import fix_size
from fluxc.signature import DECODE_INPUTS

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertKVCache(Pass):
    """Write each key and value to its slot, then attend over the request's pages; the length becomes 1.

    1. Whether a layer is full, sparse or has a window of its own is in `slots`, `page_table` and `lens`: the graph
       does not know, so it has no router and no branch.
    2. The rows that reach the head are all there are: `logits_at` goes, and with it the gather.

        %out = attention(%q, %k, %v)          kv_write(%cache, %k, %v, %slots[a])
        ...                              =>   %out = decode_attention(%q[:, :, 0], %cache, %page_table[a], %lens[a])
        return %logits                        return %logits[:, 0]

    Raises UnsupportedAttentionError for layers that one cache cannot hold, and for programs that read whole lengths.
    """

    name: ClassVar[str] = "insert-kv-cache"
    runs_after: ClassVar[tuple[str, ...]] = ("drop-routers", "set-dtype", "place")
    stage: ClassVar[str | None] = "decode"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions that read from the cache."""
        kernels.register()
        inputs = add_inputs(draft, DECODE_INPUTS[2:])
        attentions = attention_nodes(draft.graph)
        slots = _with_length(draft, inputs["slots"], before=attentions[0])
        for index, node in enumerate(attentions):
            _decode(draft, node, index, {**inputs, "slots": slots})
        fix_size(draft, draft.user_input("input_ids"), 1, 1)
        fix_size(draft, draft.user_input("logits_at"), 1, 1)
        remove_unread(draft, "seq_lens")
        keep_all_rows(draft)
        remove_unread(draft, "logits_at")
        drop_length_of_logits(draft)
        return len(attentions)


def _with_length(draft: Draft, slots: Node, before: Node) -> Node:
    """slots i64[A,B] as [A,B,1], the shape kv_write takes."""
    with draft.fake_mode:
        slots.meta["val"] = torch.empty_like(slots.meta["val"][:, :, 0])
    with draft.inserting_before(before):
        return draft.call(aten.unsqueeze.default, (slots, -1), name="slot")


def _decode(draft: Draft, node: Node, index: int, inputs: dict[str, Node]) -> None:
    kwargs = {name: argument(node, name) for name in ("scale", "layer", "softcap", "sink_logits")}
    q, k, v = (argument(node, name) for name in "qkv")
    with draft.inserting_before(node):
        slots, pages, lens = (of_layer(draft, inputs[name], index) for name in ("slots", "page_table", "lens"))
        draft.call(torch.ops.fluxc.kv_write.default, (inputs["cache"], k, v, slots))
        row = draft.call(aten.select.int, (q, 2, 0))
        args = (row, inputs["cache"], pages, lens)
        out = draft.call(torch.ops.fluxc.decode_attention.default, args, kwargs)
        whole = draft.call(aten.unsqueeze.default, (out, 1))
    node.replace_all_uses_with(whole)
    draft.graph.erase_node(node)


def keep_all_rows(draft: Draft) -> None:
    """Make the rows that reach the head all there are: case 2 of `insert-kv-cache`."""
    rows = draft.user_input("logits_at")
    for node in list(draft.graph.nodes):
        if is_call(node, aten.gather) and node.args[1] == 1 and rows in walk_back(node.args[2], _is_input):
            node.replace_all_uses_with(node.args[0])
    draft.remove_dead_code()


def _is_input(node: Node) -> bool:
    return node.op == "placeholder"


def drop_length_of_logits(draft: Draft) -> None:
    """logits [B,1,V] as [B,V]."""
    outputs: Any = draft.output.args[0]
    with draft.inserting_before(draft.output):
        last = draft.call(aten.select.int, (outputs[0], 1, 0), name="logits")
    draft.set_outputs([last])
