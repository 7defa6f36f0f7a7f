"""Values of single nodes of a program at chosen sizes, computed only from what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fluxc.ir.graph import Draft, is_call, walk_back

aten = torch.ops.aten
# Ops that read only the shape (and dtype) of their first argument, and of `type_as`'s second.
_SHAPE_READERS = (
    aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like, aten.new_ones, aten.new_zeros, aten.new_full,
    aten.new_empty,
)  # fmt: skip


class NotEvaluableError(Exception):
    """A value depends on something that was not given; the text names the node."""


class Evaluator:
    """Values of nodes for given values of some of them; sizes come from `sizes`, weights from the program.

    Calls that write in place write to copies: no value and no weight changes.

    `sizes` maps size symbols to numbers. The sizes of a tensor are read off its symbolic shape, so that a value
    that depends on the shape of the tokens alone needs no tokens.
    """

    def __init__(self, draft: Draft, sizes: Mapping[Any, int], given: Mapping[Node, Any] | None = None) -> None:
        self._sizes = dict(sizes)
        self._values: dict[Node, Any] = dict(given or {})
        self._weights = weights_of(draft)

    def __call__(self, node: Node) -> Any:
        """The node's value; raises NotEvaluableError if it depends on a value that is not given."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._values:
                stack.pop()
                continue
            missing = [n for n in value_inputs(current) if n not in self._values]
            if missing:
                stack.extend(missing)
            else:
                self._values[current] = self._compute(current)
        return self._values[node]

    def shape(self, node: Node) -> list[int]:
        """The concrete shape of the tensor `node`."""
        return [self._size(size) for size in node.meta["val"].shape]

    def _compute(self, node: Node) -> Any:
        if node.op == "placeholder" and node in self._weights:
            return self._weights[node]
        if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotEvaluableError(node.name)
        if is_call(node, aten.sym_size):
            return self._size(node.meta["val"])
        shaped = {n: self._stand_in(n) for n in node.all_input_nodes if n not in self._values}
        written = set(written_arguments(node))

        def value(source: Node) -> Any:
            found = shaped[source] if source in shaped else self._values[source]
            return found.clone() if source in written else found

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _stand_in(self, node: Node) -> torch.Tensor:
        """Any tensor of the node's shape and dtype: only those are read."""
        return torch.zeros(self.shape(node), dtype=node.meta["val"].dtype)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        value = size.node.expr.subs(self._sizes)
        if not value.is_Integer:
            raise NotEvaluableError(f"the size {size}")
        return int(value)


def written_arguments(node: Node) -> list[Node]:
    """The tensors that a call writes to in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    named = zip(schema.arguments, node.args, strict=False)
    values = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
    values += [node.kwargs[a.name] for a in schema.arguments if a.name in node.kwargs and a.alias_info]
    return [value for value in values if isinstance(value, Node)]


def value_inputs(node: Node) -> list[Node]:
    """The nodes whose values (not only whose shapes) `node` reads."""
    if is_call(node, aten.sym_size):
        return []
    if any(is_call(node, op) for op in _SHAPE_READERS):
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    if is_call(node, aten.type_as):
        return [node.args[0]]  # type: ignore[list-item]
    return node.all_input_nodes


def depends_on(node: Node, sources: Iterable[Node]) -> bool:
    """Whether the node's value (not only its shape) depends on the value of one of `sources`."""
    wanted, seen, queue = set(sources), {node}, [node]
    while queue:
        current = queue.pop()
        if current in wanted:
            return True
        for other in value_inputs(current):
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return False


def backward_slice(node: Node, stop: Callable[[Node], bool] = lambda _: False) -> list[Node]:
    """Everything the node's value depends on, the node included."""
    return list(walk_back(node, stop))


def mentioned_numbers(nodes: Iterable[Node]) -> set[int]:
    """The whole numbers among the arguments of `nodes`, without their sign."""
    leaves = [leaf for node in nodes for leaf in pytree.tree_leaves((node.args, dict(node.kwargs)))]
    return {abs(leaf) for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)}


def weights_of(draft: Draft) -> dict[Node, torch.Tensor]:
    """Tensors of parameters, buffers and constants by placeholder."""
    found = {}
    for node, spec in zip(draft.placeholders(), draft.input_specs, strict=True):
        tensor = draft.state_dict.get(spec.target, draft.constants.get(spec.target)) if spec.target else None
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            found[node] = tensor
    return found
