"""Making tables of positions anew from the input position_ids, in place of positions made inside the program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fluxc.errors import CaptureError
from fluxc.ir.evaluate import Evaluator, written_arguments
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.positions import GIVEN, MATRIX, ROWS, VECTOR, Root, Table, in_batches
from fluxc.ir.roles import Roles

aten = torch.ops.aten
# How a table may meet the tokens: element by element, the table broadcast over batch and heads.
_MEETING = (aten.add, aten.sub, aten.mul, aten.div, aten.add_, aten.mul_, aten.where, aten.rsub)
# Positions on which old and new are compared: two rows of one batch.
_TRIED = ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7))


class Lift:
    """Makes tables anew from position_ids. Copies stand beside the nodes they copy."""

    def __init__(self, draft: Draft, roles: Roles, positions: Node) -> None:
        self._draft, self._roles, self._positions = draft, roles, positions
        self._copies: dict[tuple[bool, Node], Node] = {}
        self._cut: dict[tuple[Node, int], Node] = {}
        self._vector: Node | None = None
        self._sizes: list[Node] = []

    def apply(self, table: Table) -> str:
        """Rewire every use of the table; returns what was done, in words."""
        kinds = {root.kind for root in table.roots}
        flat = bool(kinds & {VECTOR, ROWS})
        if flat and kinds & {GIVEN, MATRIX}:
            raise CaptureError(f"node {table.node.name} mixes positions of the batch with positions of all rows")
        roots = {root.node: root for root in table.roots}
        new = self._copy(table.node, roots, flat)
        for user in table.users:
            self._check_meeting(table, user)
            value = self._in_batches(table, new, user) if flat else new
            self._compare(table, value)
            user.replace_input_with(table.node, value)
        names = ", ".join(root.node.name for root in table.roots)
        return f"made from position_ids in place of {names}"

    def _copy(self, node: Node, roots: dict[Node, Root], flat: bool) -> Node:
        """The node with positions in place of its roots; `flat`: over the vector [B*S]."""
        order = {n: i for i, n in enumerate(self._draft.graph.nodes)}
        for current in sorted(_region(node, roots), key=order.__getitem__):
            key = (flat, current)
            if key not in self._copies:
                self._copies[key] = self._copied(current, roots, flat)
        return self._copies[flat, node]

    def _copied(self, node: Node, roots: dict[Node, Root], flat: bool) -> Node:
        with self._draft.inserting_before(self._place(node, flat)):
            if node in roots:
                return self._root(roots[node], flat)
            if any((flat, source) not in self._copies for source in written_arguments(node)):
                raise CaptureError(f"node {node.name} writes in place to what positions are made of")
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda source: self._source(node, source, flat))
            copied = self._draft.call(node.target, args, kwargs)
        copied.meta.update({key: value for key, value in node.meta.items() if key not in ("val", "from_node")})
        return copied

    def _place(self, node: Node, flat: bool) -> Node:
        """Where the copy of a node goes: before it, or for an input (positions [1,S]) behind the vector."""
        return self._flat_sizes()[-1].next if flat and node.op == "placeholder" else node

    def _source(self, node: Node, source: Node, flat: bool) -> Any:
        """What stands for an argument in the copy: sizes of the batch and the length become 1 and B*S."""
        if (flat, source) in self._copies:
            return self._copies[flat, source]
        val = source.meta.get("val")
        if not flat or not isinstance(val, torch.SymInt):
            return source
        if val.node.expr in self._roles.lengths:
            return self._flat_sizes()[2]
        if val.node.expr in self._roles.batches:
            return 1
        raise CaptureError(f"node {node.name} uses the size {val}, which fluxc cannot expose as positions")

    def _root(self, root: Root, flat: bool) -> Node:
        if not flat:
            return self._shifted(self._positions, root)
        vector = self._flat()
        if root.kind == ROWS:
            return self._draft.call(aten.index_select.default, (root.node.args[0], root.axis, vector))
        shifted = self._shifted(vector, root)
        two_axes = root.node.meta["val"].dim() == 2
        return self._draft.call(aten.unsqueeze.default, (shifted, 0)) if two_axes else shifted

    def _shifted(self, positions: Node, root: Root) -> Node:
        dtype = root.node.meta["val"].dtype
        if root.offset:
            positions = self._draft.call(aten.add.Tensor, (positions, root.offset))
        return positions if dtype == torch.int64 else self._draft.call(aten.to.dtype, (positions, dtype))

    def _flat(self) -> Node:
        if self._vector is None:
            first = next(node for node in self._draft.graph.nodes if node.op != "placeholder")
            with self._draft.inserting_before(first):
                self._vector = self._draft.call(aten.reshape.default, (self._positions, [-1]))
                pairs = ((self._positions, 0), (self._positions, 1), (self._vector, 0))
                self._sizes = [self._draft.call(aten.sym_size.int, pair) for pair in pairs]
        return self._vector

    def _flat_sizes(self) -> list[Node]:
        """B, S and B*S."""
        self._flat()
        return self._sizes

    def _check_meeting(self, table: Table, user: Node) -> None:
        if not any(is_call(user, op) for op in _MEETING):
            reason = f"positions (node {table.node.name}) enter node {user.name}, which is no sum or product"
            raise CaptureError(reason, hint="give the program position_ids as an input before exporting it")

    def _in_batches(self, table: Table, new: Node, user: Node) -> Node:
        """The table [1,..,B*S,..] as [B,1,..,S,..], with as many axes as the result it goes into."""
        shape, rank = list(new.meta["val"].shape), user.meta["val"].dim()
        behind = len(shape) - table.axis - 1
        room = rank - behind - 2  # axes between batch and rows
        batch, length, _ = self._flat_sizes()
        if room < 0 or any(size != 1 for size in shape[: table.axis]) or _expr(user, 0) not in self._roles.batches:
            raise CaptureError(
                f"positions (node {table.node.name}) meet the tokens at node {user.name} without a batch"
            )
        rest = shape[table.axis + 1 :]
        if any(isinstance(size, torch.SymInt) for size in rest):
            raise CaptureError(f"the table {table.node.name} has more than one free size")
        if (new, room) not in self._cut:
            with self._draft.inserting_before(new.next, like=table.node):
                sizes = [batch, *[1] * room, length, *rest]
                self._cut[new, room] = self._draft.call(aten.reshape.default, (new, sizes))
        return self._cut[new, room]

    def _compare(self, table: Table, value: Node) -> None:
        """Raise CaptureError unless the new table holds, for each batch, the old table's rows."""
        longest = max(map(max, _TRIED)) + 1
        old = self._evaluate(table.node, 2, longest, torch.arange(longest).expand(2, -1))
        new = self._evaluate(value, 2, len(_TRIED[0]), torch.tensor(_TRIED))
        for batch, positions in enumerate(_TRIED):
            rows = old.index_select(table.axis, torch.tensor(positions))
            rows = rows[batch : batch + 1] if in_batches(table.node, self._roles) else rows
            got = new[batch : batch + 1] if in_batches(value, self._roles) else new
            if not torch.equal(got.reshape(-1), rows.reshape(-1)):
                raise CaptureError(f"node {table.node.name} depends on more than each token's position")

    def _evaluate(self, node: Node, batch: int, length: int, positions: Tensor) -> Tensor:
        roles = self._roles
        given: dict[Node, Any] = {self._positions: positions}
        if roles.padding is not None:
            given[roles.padding] = torch.ones(batch, length, dtype=roles.padding.meta["val"].dtype)
        if roles.arange is not None:
            given[roles.arange] = torch.arange(length)
        if roles.positions is not None and roles.positions is not self._positions:
            given[roles.positions] = positions if roles.positions.meta["val"].shape[0] != 1 else positions[:1]
        return Evaluator(self._draft, roles.sizes(batch, length), given)(node)


def _region(node: Node, roots: dict[Node, Root]) -> set[Node]:
    """The calls between the roots and `node`, both included, that depend on a root."""
    reached: dict[Node, bool] = {}

    def depends(current: Node) -> bool:
        if current not in reached:
            sources = [depends(source) for source in _tensors(current)]
            reached[current] = current in roots or any(sources)
        return reached[current]

    depends(node)
    return {current for current, dependent in reached.items() if dependent}


def _tensors(node: Node) -> list[Node]:
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]


def _expr(node: Node, axis: int) -> Any:
    size = node.meta["val"].shape[axis]
    return size.node.expr if isinstance(size, torch.SymInt) else size
