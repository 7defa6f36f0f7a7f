"""What the passes that put a KV cache into a program share: its inputs, and which layers one cache can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from fluxc.errors import InternalError, UnsupportedAttentionError
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.layers import attention_nodes
from fluxc.kernels.schemas import PAGE
from fluxc.signature import KV_TYPES

aten = torch.ops.aten
_EXAMPLE = 4  # torch wants an example of each free size; any above 1 does


@dataclasses.dataclass(frozen=True)
class KVGeometry:
    """What one layer keeps of one token: keys and values [heads, width] in `dtype`."""

    heads: int
    width: int
    dtype: torch.dtype


def kv_geometry(attentions: list[Node]) -> KVGeometry:
    """The geometry that all attentions share, as one allocation holds the pages of all layers.

    Raises UnsupportedAttentionError, naming the layer, where they differ or values are as wide as no key.
    """
    found: dict[KVGeometry, int] = {}
    for node in attentions:
        k, v = argument(node, "k").meta["val"], argument(node, "v").meta["val"]
        layer = argument(node, "layer")
        if k.shape[3] != v.shape[3]:
            raise _refusal(f"layer {layer} has keys of width {k.shape[3]} and values of width {v.shape[3]}")
        geometry = KVGeometry(int(k.shape[1]), int(k.shape[3]), k.dtype)
        found.setdefault(geometry, layer)
        if len(found) > 1:
            (first, one), (second, other) = found.items()
            sizes = f"{first.heads} heads of {first.width}", f"{second.heads} heads of {second.width}"
            raise _refusal(
                f"one allocation serves all layers, and layer {one} caches {sizes[0]}, layer {other} {sizes[1]}"
            )
    return next(iter(found))


def _refusal(reason: str) -> UnsupportedAttentionError:
    return UnsupportedAttentionError(
        f"this model cannot have a KV cache: {reason}",
        hint="it can be captured, calibrated and evaluated; only the engine refuses it",
    )


def add_inputs(draft: Draft, names: Sequence[str]) -> dict[str, Node]:
    """Add the inputs `names` (of `signature.KV_TYPES`) in this order after those there are; their placeholders by name.

    A is the number of attentions, B and S are the program's own sizes, P and the pages become free sizes.
    """
    attentions = attention_nodes(draft.graph)
    geometry = kv_geometry(attentions)
    tokens = draft.user_input("input_ids").meta["val"]
    sizes: dict[str, Any] = {"A": len(attentions), "B": tokens.shape[0], "S": tokens.shape[1], "P": free_size(draft)}
    added = {}
    for name in names:
        if name == "cache":
            shape: list[Any] = [free_size(draft), 2, geometry.heads, PAGE, geometry.width]
            dtype = geometry.dtype
        else:
            dtype_name, axes = KV_TYPES[name]
            shape, dtype = [sizes[axis] for axis in axes], getattr(torch, dtype_name)
        with draft.fake_mode:
            val = torch.empty(shape, dtype=dtype, device=tokens.device)
        added[name] = draft.add_input(name, val)
    return added


def of_layer(draft: Draft, tensor: Node, index: int) -> Node:
    """tensor[index]: the part of an [A,...] input that belongs to attention `index`."""
    return draft.call(aten.select.int, (tensor, 0, index), name=f"{tensor.name}_{index}")


def remove_unread(draft: Draft, name: str) -> None:
    """Remove the input `name` [B,...], of which nothing but the batch is read.

    Raises UnsupportedAttentionError where more is: a text's whole length is not known while it grows.
    """
    node = draft.user_input(name)
    for user in list(node.users):
        if is_call(user, aten.sym_size) and user.args[1] == 0:
            user.args = (draft.user_input("input_ids"), 0)
    if node.users:
        raise _refusal(f"node {next(iter(node.users)).name} reads {name}")
    draft.remove_input(node)


def free_size(draft: Draft) -> Any:
    """A new symbolic size, from 1 up; never one that the program has already."""
    shapes = draft.fake_mode.shape_env
    used = _symbols(draft)
    # torch numbers a symbol by a hash of its source, modulo 100. A loaded program's symbols are not known to it.
    shapes.unique_ids.update(int(name[1:]) for name in used if name[1:].isdigit())
    source = ConstantSource(f"fluxc_size_{len(shapes.var_to_range)}")
    options: dict[str, Any] = {"dynamic_dim": DimDynamic.DYNAMIC, "do_not_specialize_zero_one": True}
    symbol = shapes.create_symbol(_EXAMPLE, source, **options)
    if symbol.name in used:
        raise InternalError(f"a new size got the symbol {symbol.name}, which the program has already")
    draft.range_constraints[symbol] = ValueRanges(1, int_oo)
    return shapes.create_symintnode(symbol, hint=_EXAMPLE, source=source)


def _symbols(draft: Draft) -> set[str]:
    """Names of the symbols in the shapes of the program's inputs."""
    sizes = [size for node in draft.placeholders() for size in getattr(node.meta.get("val"), "shape", ())]
    free = [size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)]
    return {symbol.name for symbol in (*draft.range_constraints, *(each for symbols in free for each in symbols))}
