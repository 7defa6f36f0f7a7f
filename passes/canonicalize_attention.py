"""Pass `canonicalize-attention`: turns every attention of somebody else's program into one `fluxc::attention`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.errors import UnsupportedAttentionError
from fluxc.ir.attention_pattern import Found, candidates, read_attention
from fluxc.ir.attention_product import BHSD, NotThisFormError, Operand
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.mask_proof import MaskRefusedError, prove_causal
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.repeats import heads, unrepeated
from fluxc.ir.roles import Roles, read_roles

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class CanonicalizeAttention(Pass):
    """Rewrite attentions whose mask is proven causal, with or without a window, to `fluxc::attention`.

    1. `scaled_dot_product_attention`, causal by flag or by mask.
    2. softmax(scale * QK^T + mask)V written out, by matmul or einsum; the scale may stand anywhere, the mask may be
       added, filled in or chosen; softcap * tanh(. / softcap) before the mask is the op's soft cap.
    3. Keys and values whose heads were repeated for the queries: the ones before the repetition.
    4. Anything else with a softmax over the sequence is refused, with the node and the reason.

        %k4 = reshape(expand(unsqueeze(%k)))      %o   = attention(%q, %k, %v, scale=...)
        %o  = sdpa(%q, %k4, %v4, %mask)      =>   %out = linear(reshape(%o))
        %out = linear(reshape(transpose(%o)))

    `strict` raises UnsupportedAttentionError at the first refusal; otherwise refusals are notes and stay as they were.
    """

    strict: bool = True

    name: ClassVar[str] = "canonicalize-attention"
    runs_after: ClassVar[tuple[str, ...]] = ("inline-regions", "drop-asserts", "drop-no-ops")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of attentions rewritten; what only their masks needed is removed."""
        kernels.register()
        roles = read_roles(draft)
        windows: dict[Any, int] = {}
        count = 0
        for heart in candidates(draft, roles):
            try:
                found = read_attention(draft, roles, heart)
                window = _window(draft, roles, found, windows)
            except (NotThisFormError, MaskRefusedError) as error:
                self._refuse(heart, str(error), notes)
                continue
            notes.append(Note(heart.name, True, _replace(draft, roles, found, window, count)))
            count += 1
        draft.remove_dead_code()
        return count

    def _refuse(self, heart: Node, reason: str, notes: list[Note]) -> None:
        """Case 4."""
        notes.append(Note(heart.name, False, reason))
        if self.strict:
            raise UnsupportedAttentionError(
                f"the attention at node {heart.name} cannot be represented: {reason}",
                hint="fluxc takes causal attention with an optional window, soft cap and right padding",
            )


def _window(draft: Draft, roles: Roles, found: Found, known: dict[Any, int]) -> int:
    """The window the masks prove; layers that share a mask are proven once."""
    if not found.masks and not found.is_causal:
        raise MaskRefusedError("it has no mask: every token sees every other, as in an encoder")
    q, k = found.q, found.k
    lengths = [side.node.meta["val"].shape[side.axes.index("s")] for side in (q, k)]
    if lengths[0] != lengths[1]:
        raise MaskRefusedError(f"its {lengths[0]} queries see {lengths[1]} keys (a cache, or another sequence)")
    key = (found.masks, found.is_causal)
    if key not in known:
        known[key] = prove_causal(draft, roles, list(found.masks), found.is_causal)
    return known[key]


def _replace(draft: Draft, roles: Roles, found: Found, window: int, layer: int) -> str:
    """Insert the op in place of `found`; returns what was done, in words."""
    k, v = (unrepeated(draft, roles, operand) for operand in (found.k, found.v))
    if heads(k) != heads(v):  # the op wants both alike
        k, v = found.k, found.v
    keywords: dict[str, Any] = {"scale": found.scale, "layer": layer}
    keywords.update({name: value for name, value in (("window", window), ("softcap", found.softcap)) if value})
    with draft.inserting_before(found.out):
        q, k_node, v_node = (_ordered(draft, operand, BHSD) for operand in (found.q, k, v))
        dtype = q.meta["val"].dtype
        k_node, v_node = (_in_dtype(draft, node, dtype) for node in (k_node, v_node))
        attention = draft.call(torch.ops.fluxc.attention.default, (q, k_node, v_node), keywords)
        result = _in_dtype(draft, attention, found.out.meta["val"].dtype)
        ordered = _ordered(draft, Operand(result, "bshd"), found.out_axes)
    found.out.replace_all_uses_with(ordered)
    draft.graph.erase_node(found.out)
    if ordered is not result:
        _cancel_transposes(draft, ordered, result)
    extras = [f"window {window}"] * bool(window) + [f"soft cap {found.softcap:g}"] * bool(found.softcap)
    return ", ".join(["causal", *extras, f"{heads(found.q)} heads over {heads(k)}"])


def _ordered(draft: Draft, operand: Operand, axes: str) -> Node:
    """The tensor with its axes in the order `axes`."""
    if operand.axes == axes:
        return operand.node
    order = [operand.axes.index(axis) for axis in axes]
    swapped = [index for index, source in enumerate(order) if index != source]
    if len(swapped) == 2:
        return draft.call(aten.transpose.int, (operand.node, *swapped))
    return draft.call(aten.permute.default, (operand.node, order))


def _in_dtype(draft: Draft, node: Node, dtype: torch.dtype) -> Node:
    return node if node.meta["val"].dtype == dtype else draft.call(aten.to.dtype, (node, dtype))


def _cancel_transposes(draft: Draft, ordered: Node, result: Node) -> None:
    """Let users that transpose the output back, past reshapes that change nothing, read the op's own output."""
    for user in list(ordered.users):
        if _keeps_shape(user, ordered):
            _cancel_transposes(draft, user, result)
        elif is_call(user, aten.transpose.int) and {argument(user, "dim0"), argument(user, "dim1")} <= {1, 2, -2, -3}:
            user.replace_all_uses_with(result)
            draft.graph.erase_node(user)
    if not ordered.users:
        draft.graph.erase_node(ordered)


def _keeps_shape(node: Node, source: Node) -> bool:
    reshapes = is_call(node, aten.reshape) or is_call(node, aten.view)
    return reshapes and tuple(node.meta["val"].shape) == tuple(source.meta["val"].shape)
