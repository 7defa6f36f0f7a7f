"""Pass `expose-kv`: makes a routed or captured program the prefill of one request, which hands out keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument
from fluxc.ir.kv import kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.sizes import fix_size


@dataclasses.dataclass(frozen=True)
class ExposeKV(Pass):
    """Add key and value of each attention to the outputs and fix the batch to 1.

    1. A routed program decides its routes from the prompt as before; a captured one becomes the dense prefill.
    2. Keys stand after RoPE, as the cache keeps them.

        %out = routed_attention(%q, %k, %v, %route)         %out = routed_attention(%q, %k, %v, %route)
        return %logits, %routes, %scores               =>   return %logits, %routes, %scores, %k, %v

    Raises UnsupportedAttentionError for layers that one cache cannot hold.
    """

    name: ClassVar[str] = "expose-kv"
    runs_after: ClassVar[tuple[str, ...]] = ("drop-routers", "route-attention", "apply-plan", "place")
    stage: ClassVar[str | None] = "prefill"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions that hand out their keys and values."""
        kernels.register()
        attentions = attention_nodes(draft.graph)
        kv_geometry(attentions)
        outputs: Any = draft.output.args[0]
        draft.set_outputs([*outputs, *kv_nodes(attentions)])
        fix_size(draft, draft.user_input("input_ids"), 0, 1)
        return len(attentions)


def kv_nodes(attentions: list[Node]) -> list[Node]:
    """k_0, v_0, k_1, v_1, ...: what the attentions read."""
    return [argument(node, name) for node in attentions for name in "kv"]
