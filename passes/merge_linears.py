"""Pass `merge-linears`: one GEMM for projections that read the same value (q, k and v; gate and up)."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.renew import renew

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class MergeLinears(Pass):
    """Replace linears of one module that read the same value by one linear and a split.

    1. Weights that lie one after another in memory are merged by a view: nothing is copied.
    2. Others are copied together, and the program refers to the copy alone. With `copy` False they stay apart.
    3. A weight that something else uses too, tied ones included, keeps its group as it is.
    4. Where a later op cannot take a part of the result (it is strided), its group stays as it is.

        %q = linear(%x, attn.q.weight)        %qkv = linear(%x, attn.q_and_k_and_v.weight)
        %k = linear(%x, attn.k.weight)   =>   %q, %k, %v = split_with_sizes(%qkv, [16, 8, 8], -1)
        %v = linear(%x, attn.v.weight)

    The products are the same; a GEMM of another width may round them differently.
    """

    copy: bool = True  # whether weights that lie apart are copied together

    name: ClassVar[str] = "merge-linears"
    runs_after: ClassVar[tuple[str, ...]] = ("set-dtype", "place", "insert-routers")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of linears merged into others."""
        names = _weight_names(draft)
        found = [(group, self._refusal(draft, group, names)) for group in _groups(draft, names)]
        reasons = _layout_refusals(draft, [group for group, reason in found if reason is None])
        merged = 0
        for group, refused in found:
            reason = refused or reasons.get(group[0])
            notes.append(Note(group[0].name, reason is None, reason or f"one GEMM for {len(group)}"))
            if reason is None:
                _merge(draft, group, names)
                merged += len(group)
        return merged

    def _refusal(self, draft: Draft, group: list[Node], names: dict[Node, str]) -> str | None:
        held = [node for linear in group for node in _weights(linear)]
        if any(len(node.users) > 1 or _is_tied(draft, names[node]) for node in held):
            return "a weight is used elsewhere too"
        columns = [[draft.state_dict[names[node]] for node in column] for column in _columns(group)]
        return None if self.copy or all(map(adjacent, columns)) else "the weights lie apart"


def adjacent(tensors: list[Tensor]) -> bool:
    """Whether contiguous tensors lie one after another in one storage."""
    ends = [t.storage_offset() + t.numel() for t in tensors]
    starts = [t.storage_offset() for t in tensors]
    alike = {(t.dtype, t.device, t.untyped_storage().data_ptr()) for t in tensors}
    return len(alike) == 1 and all(t.is_contiguous() for t in tensors) and starts[1:] == ends[:-1]


def joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one after another along their first axis: a view where they lie so, else a copy."""
    if not adjacent(tensors):
        return torch.cat([tensor.detach() for tensor in tensors])
    first = tensors[0].detach()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def groups_of(program: torch.export.ExportedProgram) -> list[list[str]]:
    """Names of the weights (and of the biases) that the pass would merge if it could: what should lie together."""
    draft = Draft(program)
    names = _weight_names(draft)
    return [[names[node] for node in column] for group in _groups(draft, names) for column in _columns(group)]


def _weight_names(draft: Draft) -> dict[Node, str]:
    pairs = zip(draft.placeholders(), draft.input_specs, strict=True)
    return {node: str(spec.target) for node, spec in pairs if spec.kind == InputKind.PARAMETER}


def _groups(draft: Draft, names: dict[Node, str]) -> list[list[Node]]:
    """Linears with weights of their own in one module that read the same value, all or none with a bias."""
    found: dict[tuple[Node, str, int], list[Node]] = {}
    for node in draft.graph.nodes:
        if is_call(node, aten.linear) and all(weight in names for weight in _weights(node)):
            module = names[_weights(node)[0]].rpartition(".")[0].rpartition(".")[0]
            found.setdefault((node.args[0], module, len(_weights(node))), []).append(node)
    return [group for group in found.values() if len(group) > 1]


def _columns(group: list[Node]) -> list[tuple[Node, ...]]:
    """The weights of a group, then its biases."""
    return list(zip(*map(_weights, group), strict=True))


def _weights(linear: Node) -> list[Node]:
    """Weight and, where it has one, bias."""
    return [node for node in (argument(linear, "weight"), argument(linear, "bias")) if node is not None]


def _is_tied(draft: Draft, name: str) -> bool:
    own = draft.state_dict[name]
    return any(other is own for key, other in draft.state_dict.items() if key != name)


def _layout_refusals(draft: Draft, groups: list[list[Node]]) -> dict[Node, str]:
    """Case 4, tried on fake values: why groups cannot be merged, by their first linear."""
    if _try_layout(draft, groups) is None:
        return {}
    tried = {group[0]: _try_layout(draft, [group]) for group in groups}
    return {first: reason for first, reason in tried.items() if reason}


def _try_layout(draft: Draft, groups: list[list[Node]]) -> str | None:
    """Give the linears the strides that parts of a wider result have; all values are as they were if that fails."""
    linears = [node for group in groups for node in group]
    before = {node: node.meta["val"] for node in linears}
    for group in groups:
        width = sum(int(node.meta["val"].shape[-1]) for node in group)
        for node in group:
            node.meta["val"] = _strided(draft, node, width)
    try:
        renew(draft, linears)
    except (RuntimeError, ValueError) as error:
        for node, val in before.items():
            node.meta["val"] = val
        renew(draft, linears)
        return f"a later op cannot take a part of the result: {error}".splitlines()[0]
    return None


def _strided(draft: Draft, node: Node, width: int) -> Any:
    """The value of `node` as a part of one whose last axis has `width` entries."""
    val = node.meta["val"]
    with draft.fake_mode:
        return val.new_empty([*val.shape[:-1], width])[..., : val.shape[-1]]


def _merge(draft: Draft, group: list[Node], names: dict[Node, str]) -> None:
    columns = _columns(group)
    merged = [_add(draft, [names[node] for node in column]) for column in columns]
    sizes = [int(node.meta["val"].shape[-1]) for node in group]
    with draft.inserting_before(group[0]):
        whole = draft.call(aten.linear.default, (group[0].args[0], *merged), name="merged")
        parts = draft.call(aten.split_with_sizes.default, (whole, sizes, -1))
        items = [draft.call(operator.getitem, (parts, index), name=node.name) for index, node in enumerate(group)]
    for node, item in zip(group, items, strict=True):
        node.replace_all_uses_with(item)
        draft.graph.erase_node(node)
    for node in (node for column in columns for node in column):
        draft.remove_input(node)


def _add(draft: Draft, names: list[str]) -> Node:
    tensor = joined([draft.state_dict[name] for name in names])
    return draft.add_parameter(merged_name(names), tensor)


def merged_name(names: list[str]) -> str:
    """attn.q.weight, attn.k.weight -> attn.q_and_k.weight."""
    module, _, _ = names[0].rpartition(".")
    parent, _, _ = module.rpartition(".")
    leaf = names[0].rpartition(".")[2]
    children = "_and_".join(name.rpartition(".")[0].rpartition(".")[2] for name in names)
    return ".".join(part for part in (parent, children, leaf) if part)
