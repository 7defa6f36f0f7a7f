"""Pass `insert-past`: keys and values of all earlier tokens come in and go out, as Hugging Face's models have it."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.graph import Draft, argument
from fluxc.ir.kv import free_size, kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sizes import fix_size
from fluxc.passes.rope_per_request import rope_limit

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertPast(Pass):
    """Let each attention of a routed program read the tokens before this call as well, in one dense cache a layer.

    1. past_k_a, past_v_a [1,Hk,P,D] come in, and present_k_a, present_v_a [1,Hk,P+S,D] go out. Nothing is evicted.
    2. The batch becomes 1. `prompt_lens` becomes S, `seq_lens` too, and logits are those of the last token alone.

        %out = routed_attention(%q, %k, %v, %route)         %present_k_0 = cat([%past_k_0, %k], 2), the same for v
        return %logits, %routes, %scores               =>   %out = routed_attention(%q, %present_k_0, %present_v_0, ...)
                                                            return %logits, %present_k_0, %present_v_0, ...

    The last query of an attention stands at the last key, which only exporters know how to write: no op of ours
    computes the result. Raises UnsupportedAttentionError for layers that one cache cannot hold.
    """

    name: ClassVar[str] = "insert-past"
    runs_after: ClassVar[tuple[str, ...]] = ("route-attention", "apply-plan", "fold-pins", "set-dtype", "place")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions that read a cache."""
        kernels.register()
        attentions = attention_nodes(draft.graph)
        kv_geometry(attentions)
        fix_size(draft, draft.user_input("input_ids"), 0, 1)
        _replace_lengths(draft)
        past = free_size(draft)
        present = [part for index, node in enumerate(attentions) for part in _extend(draft, node, index, past)]
        outputs: Any = draft.output.args[0]
        draft.set_outputs([outputs[0], *present])
        draft.remove_dead_code()
        return len(attentions)


def check_rope(program: Any) -> None:
    """Raise UnsupportedAttentionError where keys would have to be rotated anew as the text grows."""
    if rope_limit(program):
        raise UnsupportedAttentionError(
            "the RoPE factors of this model change with the length, and a dense cache keeps old keys as they are",
            hint="export without --io hf",
        )


def _replace_lengths(draft: Draft) -> None:
    """Case 2."""
    ids = draft.user_input("input_ids")
    first = next(node for node in draft.graph.nodes if node.op != "placeholder")
    options = {"dtype": torch.int64, "device": ids.meta["val"].device, "pin_memory": False}
    with draft.inserting_before(first):
        size = draft.call(aten.sym_size.int, (ids, 1))
        end = draft.call(aten.arange.start, (size, draft.call(operator.add, (size, 1))), options)
        last = draft.call(aten.view.default, (draft.call(aten.sub.Tensor, (end, 1)), [1, 1]))
    for name, value in (("prompt_lens", end), ("seq_lens", end), ("logits_at", last)):
        _replace_input(draft, name, value)


def _replace_input(draft: Draft, name: str, value: Node) -> None:
    node = next((each for each in draft.placeholders() if each.name == name), None)
    if node is not None:
        node.replace_all_uses_with(value)
        draft.remove_input(node)


def _extend(draft: Draft, node: Node, index: int, past: Any) -> list[Node]:
    """Case 1, one layer."""
    made = []
    for name in "kv":
        rows = argument(node, name)
        val = rows.meta["val"]
        with draft.fake_mode:
            shape = torch.empty(1, val.shape[1], past, val.shape[3], dtype=val.dtype, device=val.device)
        before = draft.add_input(f"past_{name}_{index}", shape)
        with draft.inserting_before(node):
            made.append(draft.call(aten.cat.default, ([before, rows], 2), name=f"present_{name}_{index}"))
    args = list(node.args)
    args[1:3] = made
    node.args = tuple(args)
    return made
