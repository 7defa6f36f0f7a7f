"""Finding where positions are made inside somebody else's program, and where tables made of them meet the tokens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fluxc.errors import CaptureError
from fluxc.ir.evaluate import (
    Evaluator,
    NotEvaluableError,
    backward_slice,
    mentioned_numbers,
    value_inputs,
    weights_of,
)
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.roles import Roles

aten = torch.ops.aten
_SIZES = ((2, 5), (3, 9))  # (batch, length) that values are looked at
_LONGEST = 2**18  # of the lengths that the numbers in a table's code suggest
GIVEN, VECTOR, MATRIX, ROWS = "given", "vector", "matrix", "rows"


@dataclasses.dataclass(frozen=True)
class Root:
    """Where positions enter a table.

    `kind`: GIVEN, the input position_ids; VECTOR, counts 0..S-1 plus `offset`, [S] or [1,S]; MATRIX, the same [B,S];
    ROWS, the first S rows (along `axis`) of a constant.
    """

    node: Node
    kind: str
    offset: int = 0
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class Table:
    """A value made of positions and weights alone that meets the tokens; its rows lie along `axis`."""

    node: Node
    axis: int
    roots: tuple[Root, ...]
    users: tuple[Node, ...]


def find_tables(draft: Draft, roles: Roles) -> list[Table]:
    """The tables whose positions are made inside, in graph order.

    Raises CaptureError, naming the node, for a table that depends on the prompt's length or on more than positions.
    """
    finder = _Finder(draft, roles)
    tables = []
    for node in draft.graph.nodes:
        users = tuple(user for user in node.users if finder.on_tokens(user) and node in value_inputs(user))
        if users and finder.is_table(node):
            roots = finder.roots(node)
            if any(root.kind != GIVEN for root in roots):
                tables.append(Table(node, finder.row_axis(node), roots, users))
    return tables


class _Finder:
    def __init__(self, draft: Draft, roles: Roles) -> None:
        self._draft, self._roles, self._weights = draft, roles, weights_of(draft)
        self._runs = [_Run(draft, roles, *sizes) for sizes in _SIZES]
        self._tokens = _reached(draft, [roles.tokens])
        inputs = [node for node in (roles.padding, roles.positions, roles.arange) if node is not None]
        sizes = [node for node in draft.graph.nodes if is_call(node, aten.sym_size)]
        self._made = _reached(draft, [*inputs, *sizes])
        self._known: dict[Node, Root | None] = {}

    def on_tokens(self, node: Node) -> bool:
        """Whether the node's value depends on the tokens."""
        return node in self._tokens

    def is_table(self, node: Node) -> bool:
        """Whether the node holds one row for each position, and not the same row for all."""
        val = node.meta.get("val")
        if node in self._tokens or node not in self._made or not isinstance(val, Tensor):
            return False
        if any(self._is_flat(size) for size in val.shape):
            return False  # numbers of the rows of all prompts together (experts sort them), no positions
        axes = [axis for axis, size in enumerate(val.shape) if self._is_length(size)]
        if not axes:
            self._check_constant(node)
            return False
        if len(axes) > 1 or not self._rows_agree(node, axes[0]):
            raise CaptureError(
                f"node {node.name} mixes positions with each other or with the prompt's length",
                hint="fluxc needs values that depend on each token's own position (no dynamic NTK scaling)",
            )
        value = self._first(node, self._runs[0])
        return not bool((value == value.narrow(axes[0], 0, 1)).all())

    def row_axis(self, node: Node) -> int:
        """The axis of the rows, counted from the front."""
        return next(axis for axis, size in enumerate(node.meta["val"].shape) if self._is_length(size))

    def roots(self, table: Node) -> tuple[Root, ...]:
        """Where positions enter, walking back from the table; raises CaptureError where something else does."""
        found: dict[Node, Root] = {}
        queue, seen = [table], {table}
        while queue:
            node = queue.pop()
            if root := self._root(node):
                found[node] = root
                continue
            if node.op == "placeholder" and node not in self._weights:
                raise CaptureError(f"node {table.name} depends on the input {node.name} other than by positions")
            for source in value_inputs(node):
                if source not in seen and source in self._made and isinstance(source.meta.get("val"), Tensor):
                    seen.add(source)
                    queue.append(source)
        if not found:
            raise CaptureError(f"node {table.name} varies along the prompt without positions that fluxc can tell")
        return tuple(found.values())

    def _root(self, node: Node) -> Root | None:
        if node not in self._known:
            self._known[node] = self._classify(node)
        return self._known[node]

    def _classify(self, node: Node) -> Root | None:
        if node is self._roles.positions and node.meta["val"].shape[0] != 1:
            return Root(node, GIVEN)
        if is_call(node, aten.slice) and node.args[0] not in self._made:
            return self._rows(node)
        kind = self._shape_kind(node.meta["val"].shape)
        offsets = {_offset(run(node), run.valid) for run in self._runs} if kind else {None}
        offset = offsets.pop()
        return Root(node, kind, offset) if not offsets and offset is not None else None

    def _rows(self, node: Node) -> Root | None:
        start, step, end = (argument(node, name) for name in ("start", "step", "end"))
        whole = start in (0, None) and step == 1 and isinstance(end, Node)
        return Root(node, ROWS, axis=argument(node, "dim")) if whole and self._is_length(end.meta["val"]) else None

    def _shape_kind(self, shape: Any) -> str:
        sizes = [_expr(size) for size in shape]
        if not sizes or sizes[-1] not in self._roles.lengths:
            return ""
        if len(sizes) == 1 or (len(sizes) == 2 and sizes[0] == 1):
            return VECTOR
        return MATRIX if len(sizes) == 2 and sizes[0] in self._roles.batches else ""

    def _is_length(self, size: Any) -> bool:
        return bool(self._roles.lengths & _free_symbols(size))

    def _is_flat(self, size: Any) -> bool:
        free = _free_symbols(size)
        return bool(self._roles.lengths & free and self._roles.batches & free)

    def _rows_agree(self, node: Node, axis: int) -> bool:
        """Whether a row is the same in a longer prompt, and in a larger batch."""
        short, long = (self._first(node, run) for run in self._runs)
        if short.shape[axis] != _SIZES[0][1] or long.shape[axis] != _SIZES[1][1]:
            return False
        return all(_starts_with(value, short, axis) for value in (long, *self._longer(node)))

    def _first(self, node: Node, run: _Run) -> Tensor:
        """The value for the first prompt, of which no token is padding."""
        return run(node)[:1] if in_batches(node, self._roles) else run(node)

    def _longer(self, node: Node) -> Iterator[Tensor]:
        """Values in prompts past every number the table's code mentions, where a context may end."""
        numbers = mentioned_numbers(backward_slice(node))
        for length in sorted(n + 3 for n in numbers if _SIZES[-1][1] < n < _LONGEST):
            with contextlib.suppress(CaptureError):  # a table that ends there
                yield _Run(self._draft, self._roles, 1, length)(node)

    def _check_constant(self, node: Node) -> None:
        values = [run(node) for run in self._runs]
        if values[0].shape == values[1].shape and not torch.equal(values[0], values[1]):
            raise CaptureError(f"node {node.name} depends on the prompt's length", hint="dynamic scaling is refused")


class _Run:
    """Values at one batch and length, all tokens valid but for the last row's last."""

    def __init__(self, draft: Draft, roles: Roles, batch: int, length: int) -> None:
        self.batch = batch
        self.valid = torch.ones(batch, length, dtype=torch.bool)
        self.valid[-1, -1] = roles.padding is None
        given: dict[Node, Any] = {}
        if roles.padding is not None:
            given[roles.padding] = self.valid.to(roles.padding.meta["val"].dtype)
        if roles.arange is not None:
            given[roles.arange] = torch.arange(length)
        if roles.positions is not None:
            rows = 1 if roles.positions.meta["val"].shape[0] == 1 else batch
            given[roles.positions] = torch.arange(length).expand(rows, -1)
        self._evaluate = Evaluator(draft, roles.sizes(batch, length), given)

    def __call__(self, node: Node) -> Any:
        try:
            return self._evaluate(node)
        except (NotEvaluableError, RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CaptureError(f"node {node.name} cannot be evaluated apart from the tokens ({error})") from error


def _starts_with(value: Tensor, rows: Tensor, axis: int) -> bool:
    count = min(value.shape[axis], rows.shape[axis])
    return torch.equal(rows.narrow(axis, 0, count), value.narrow(axis, 0, count))


def in_batches(node: Node, roles: Roles) -> bool:
    """Whether the first axis of a tensor is the batch."""
    shape = node.meta["val"].shape
    return bool(shape) and _expr(shape[0]) in roles.batches


def _reached(draft: Draft, sources: list[Node]) -> set[Node]:
    """Nodes whose values depend on one of `sources`; sizes read off a tensor do not depend on it."""
    reached = set(sources)
    for node in draft.graph.nodes:
        if any(source in reached for source in value_inputs(node)):
            reached.add(node)
    return reached


def _offset(value: Tensor, valid: Tensor) -> int | None:
    """c where the value is 0..S-1 plus c at every valid token, None where it is something else."""
    if value.dtype in (torch.bool, torch.complex64, torch.complex128):
        return None
    difference = value - torch.arange(value.shape[-1])
    shown = difference.expand_as(valid)[valid] if difference.dim() == 2 else difference
    first = shown[0].item()
    return int(first) if bool((shown == first).all()) and float(first).is_integer() else None


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _free_symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()
