"""Pass `insert-routers`: puts a Layer Router in front of every routable attention."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.rope import Dependence, Query, query_before_rope
from fluxc.router import POOL, RouterSpec, init_router, router_name

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class InsertRouters(Pass):
    """Insert pool, encoder, head and score of a router before each attention without a window of its own.

    1. An attention with a window of its own is left as it is.
    2. The router reads q before RoPE and after any q-norm; where the rotation cannot be told, q itself.
    3. A q that lies [B,S,H,D] before RoPE is transposed first.

        %q    = attention input, rotated          %pool  = router_pool(%q_pre, %prompt_lens, pool=100)
        %out  = attention(%q, %k, %v)        =>   ...    = linear, silu, linear, linear, silu, linear, silu, linear
                                                  %score = logits[:, 0] - logits[:, 1]
                                                  %out   = attention(%q, %k, %v)

    The program gains the input `prompt_lens` and the output `scores` f32[L,B]; `route-attention` uses the scores.
    """

    pool: int = POOL  # tokens pooled at each end of the prompt
    seed: int = 0  # of the first router weights

    name: ClassVar[str] = "insert-routers"
    # set-dtype first: it would retype the routers, which stay fp32.
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize-attention", "expose-positions", "set-dtype")
    stage: ClassVar[str | None] = "scored"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of routers put in."""
        kernels.register()
        attentions = routable_attentions(draft, notes)
        if not attentions:
            return 0
        dependence = Dependence(draft.graph)
        prompt_lens = _add_prompt_lens(draft)
        scores = []
        for attention in attentions:
            query = query_before_rope(attention, dependence)
            notes.append(_note(attention, query))
            scores.append(self._insert(draft, attention, query, prompt_lens))
        with draft.inserting_before(draft.output):
            stacked = draft.call(aten.stack.default, (scores,), name="scores")
        draft.set_outputs([*draft.output.args[0], stacked])  # type: ignore[misc]
        return len(attentions)

    def _insert(self, draft: Draft, attention: Node, query: Query, prompt_lens: Node) -> Node:
        layer = argument(attention, "layer")
        spec = RouterSpec(int(query.node.meta["val"].shape[-1]), self.pool)
        prefix = router_name(layer)
        device = query.node.meta["val"].device
        state = init_router(spec, self.seed + layer)  # drawn on the CPU: the same weights on every device
        weights = {name: draft.add_parameter(prefix + name, tensor.to(device)) for name, tensor in state.items()}
        with draft.inserting_before(attention):
            q = query.node
            if query.layout == "BSHD":  # case 3
                q = draft.call(aten.transpose.int, (q, 1, 2))
            pooled = draft.call(torch.ops.fluxc.router_pool.default, (q, prompt_lens), {"pool": self.pool})
            return _score(draft, pooled, weights)


def routable_attentions(draft: Draft, notes: list[Note]) -> list[Node]:
    """Attention nodes a router may be put in front of, in graph order; says why for the others."""
    if any(is_call(node, torch.ops.fluxc.router_pool) for node in draft.graph.nodes):
        notes.append(Note("output", False, "the program already has routers"))
        return []
    attentions = [node for node in draft.graph.nodes if is_call(node, torch.ops.fluxc.attention)]
    for node in attentions:
        if argument(node, "window"):  # case 1
            notes.append(Note(node.name, False, f"has a window of its own, {argument(node, 'window')} tokens"))
    return [node for node in attentions if not argument(node, "window")]


def _add_prompt_lens(draft: Draft) -> Node:
    with draft.fake_mode:
        val = torch.empty_like(draft.user_input("seq_lens").meta["val"])
    return draft.add_input("prompt_lens", val, before="logits_at")


def _note(attention: Node, query: Query) -> Note:
    if query.found:
        return Note(attention.name, True, query.reason)
    return Note(attention.name, True, f"the router reads q after RoPE: {query.reason}")  # case 2


def _score(draft: Draft, pooled: Node, weights: dict[str, Node]) -> Node:
    def linear(x: Node, name: str) -> Node:
        return draft.call(aten.linear.default, (x, weights[f"{name}.weight"], weights[f"{name}.bias"]))

    def silu(x: Node) -> Node:
        return draft.call(aten.silu.default, (x,))

    context = linear(silu(linear(pooled, "encoder.0")), "encoder.2")
    logits = linear(silu(linear(silu(linear(context, "head.0")), "head.2")), "head.4")
    full, sparse = (draft.call(aten.select.int, (logits, 1, index)) for index in (0, 1))
    return draft.call(aten.sub.Tensor, (full, sparse), name="score")
