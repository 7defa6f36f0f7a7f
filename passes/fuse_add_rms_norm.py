"""Pass `fuse-add-rms-norm`: the residual sum and the norm that follows it in one pass over memory."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.norms import RmsNorm, rms_norm_of
from fluxc.ir.pass_base import Note, Pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class FuseAddRmsNorm(Pass):
    """Replace a sum of two values and the RMS norm of it by `fluxc::add_rms_norm`.

    1. The sum has other readers (the residual stream goes on): they read the op's second result.
    2. A norm of something else than a sum (the embeddings) is left as it is, and so is one that does not round to
       the model's dtype before it multiplies by its weight (Gemma's 1 + w, in fp32), which the op would.

        %sum  = add(%x, %residual)
        ...   = to, pow, mean, add, rsqrt, mul, to      =>     %normed, %sum = add_rms_norm(%x, %residual, %w, eps=..)
        %normed = mul(%w, ...)
    """

    name: ClassVar[str] = "fuse-add-rms-norm"
    runs_after: ClassVar[tuple[str, ...]] = ("set-dtype", "drop-routers")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of norms fused with their sums."""
        kernels.register()
        count = 0
        for norm in [found for node in draft.graph.nodes if (found := rms_norm_of(node))]:
            reason = norm.refusal or _refusal(norm)
            notes.append(Note(norm.node.name, reason is None, reason or f"the norm of {norm.x.name}"))
            if reason is None:
                _fuse(draft, norm)
                count += 1
        draft.remove_dead_code()
        return count


def _refusal(norm: RmsNorm) -> str | None:
    add = norm.x
    if not is_call(add, aten.add.Tensor) or not all(isinstance(arg, Node) for arg in add.args) or add.kwargs:
        return f"{add.name} is no plain sum of two values"  # case 2
    whole = add.meta["val"]
    parts = [arg.meta["val"] for arg in add.args]  # type: ignore[union-attr]
    if any((str(p.shape), p.dtype) != (str(whole.shape), whole.dtype) for p in parts):
        return f"the parts of {add.name} differ in shape or dtype"
    return None if whole.is_contiguous() else f"{add.name} is strided"


def _fuse(draft: Draft, norm: RmsNorm) -> None:
    add = norm.x
    # In place of the sum, and in its layer: what reads the sum may stand before the norm.
    with draft.inserting_before(add):
        both = draft.call(torch.ops.fluxc.add_rms_norm.default, (*add.args, norm.weight), {"eps": norm.eps})
        normed = draft.call(operator.getitem, (both, 0), name="normed")
        total = draft.call(operator.getitem, (both, 1), name=add.name)
    norm.node.replace_all_uses_with(normed)
    add.replace_all_uses_with(total)
    draft.remove_dead_code()
