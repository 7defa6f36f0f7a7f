"""Pass `fuse-qk-norm-rope`: head norms, RoPE, the KV write and the router's pool in one pass after the projections."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fluxc import kernels
from fluxc.ir.graph import Draft, argument, is_call
from fluxc.ir.layers import ATTENTIONS
from fluxc.ir.norms import RmsNorm, rms_norm_of
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.renew import renew
from fluxc.ir.rotation import Rotation, is_same, rotation_of, table_of
from fluxc.kernels.schemas import PAGE

aten = torch.ops.aten
_READERS = (*ATTENTIONS, "decode_attention", "append_attention")


@dataclasses.dataclass(frozen=True)
class Heads:
    """q or k before norm and RoPE. `norm` is None where there is none; `is_moved`: it lies [B,S,H,D] before it."""

    x: Node
    norm: RmsNorm | None
    is_moved: bool


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one call of the op takes the place of. `write` and `pool` are None where the phase has none."""

    q: Node
    k: Node
    v: Node
    turns: tuple[Rotation, Rotation]
    heads: tuple[Heads, Heads]
    write: Node | None
    pool: Node | None


@dataclasses.dataclass(frozen=True)
class FuseQkNormRope(Pass):
    """Replace what stands between the projections and an attention by `fluxc::qk_norm_rope_cache`.

    1. Decode writes keys and values to the cache in the same call.
    2. A prefill hands them to the engine, and a further turn is written after its attention: there the op writes to
       no slot of a page of its own.
    3. Where a router pools the queries, its sum comes out of the op, which reads them anyway.
    4. A norm that other nodes read too stays in front of the op, and so does one over all heads at once. Rotations
       other than rotate-half, and layers without one, are left as they are.

        %q_1 = rms_norm(%q, ...)
        %q_2 = %q_1 * cos + half(%q_1) * sin      =>     %q_2, %k_2, %pool = qk_norm_rope_cache(%q, %k, %v, ...)
        ...                                              %out = decode_attention(%q_2, %cache, ...)
        kv_write(%cache, %k_2, %v, %slots)
    """

    name: ClassVar[str] = "fuse-qk-norm-rope"
    runs_after: ClassVar[tuple[str, ...]] = ("expose-kv", "insert-kv-cache", "append-turn", "rope-per-request")

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of layers whose heads are prepared by the op."""
        kernels.register()
        blanks = _Blanks(draft)
        count = 0
        for node in [node for node in draft.graph.nodes if _is_reader(node)]:
            found = _layer(node)
            reason = found if isinstance(found, str) else _fuse(draft, found, blanks)
            notes.append(Note(node.name, reason is None, reason or "norms, RoPE and pool in one op"))
            count += reason is None
        draft.remove_dead_code()
        return count


class _Blanks:
    """Arguments that mean nothing: slots that drop every token, lengths of prompts that nobody pools."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._made: dict[str, Node] = {}

    def slots(self) -> Node:
        return self._once("no_slots", aten.full_like.default, lambda positions: (positions, -1))

    def lens(self) -> Node:
        return self._once("no_lens", aten.select.int, lambda positions: (positions, 1, 0))

    def cache(self, k: Node) -> Node:
        """A page of k's shape."""
        val = k.meta["val"]
        size = [1, 2, int(val.shape[1]), PAGE, int(val.shape[3])]
        kwargs = {"dtype": val.dtype, "device": val.device}
        return self._once(f"no_cache_{size[2]}", aten.empty.memory_format, lambda _: (size,), kwargs)

    def _once(self, name: str, op: Any, args: Any, kwargs: dict[str, Any] | None = None) -> Node:
        if name not in self._made:
            first = next(node for node in self._draft.graph.nodes if node.op == "call_function")
            positions = self._draft.user_input("position_ids")
            with self._draft.inserting_before(first):
                self._made[name] = self._draft.call(op, args(positions), kwargs, name=name)
        return self._made[name]


def _is_reader(node: Node) -> bool:
    return any(is_call(node, getattr(torch.ops.fluxc, name)) for name in _READERS)


def _layer(node: Node) -> Layer | str:
    """What is to be fused in front of an attention, or why nothing is."""
    write = _write_before(node) if is_call(node, torch.ops.fluxc.decode_attention) else None
    source = write or node
    if is_call(source, torch.ops.fluxc.decode_attention):
        return "its keys are written by another op"
    q, (k, v) = argument(node, "q"), (argument(source, name) for name in "kv")
    q = q.args[0] if write and is_call(q, aten.select) else q  # decode takes one row
    turns = rotation_of(q), rotation_of(k)
    if turns[0] is None or turns[1] is None:
        return "no rotate-half RoPE in front of it"
    heads = _heads(turns[0]), _heads(turns[1])
    return _checked(Layer(q, k, v, (turns[0], turns[1]), heads, write, _pool_of(turns[0])))


def _write_before(node: Node) -> Node | None:
    """The write of a decode layer, between the attention of the layer before and its own."""
    before = node.prev
    while before.op == "call_function" and not _is_reader(before):
        if is_call(before, torch.ops.fluxc.kv_write):
            return before
        before = before.prev
    return None


def _checked(layer: Layer) -> Layer | str:
    (one, other), val = layer.turns, layer.q.meta["val"]
    if not is_same(table_of(one.cos), table_of(other.cos)) or not is_same(table_of(one.sin), table_of(other.sin)):
        return "queries and keys turn by different tables"
    epsilons = {heads.norm.eps for heads in layer.heads if heads.norm}
    if len(epsilons) > 1:
        return "the norms of queries and keys have different epsilons"
    B, _, S, D = (str(size) for size in val.shape)
    for table in (one.cos, one.sin):
        shape = [str(size) for size in table.meta["val"].shape]
        if table.meta["val"].dtype != val.dtype or [shape[0], *shape[1:-1]] != [B, "1", S] or int(shape[-1]) > int(D):
            return f"the table {table.name} is not one of [{B},1,{S},R] in {val.dtype}"
    values = (layer.turns[0].x, layer.turns[1].x, layer.k, layer.v)
    return layer if {node.meta["val"].dtype for node in values} == {val.dtype} else "it rotates in another dtype"


def _heads(turn: Rotation) -> Heads:
    is_moved = is_call(turn.x, aten.transpose.int) and sorted(a % 4 for a in turn.x.args[1:]) == [1, 2]  # type: ignore[operator]
    inner: Node = turn.x.args[0] if is_moved else turn.x  # type: ignore[assignment]
    norm = rms_norm_of(inner)
    if norm is None or norm.refusal or (is_moved and len(inner.users) > 1) or not _is_read_here_alone(turn.x):
        return Heads(turn.x, None, False)
    return Heads(norm.x, norm, is_moved)


def _is_read_here_alone(x: Node) -> bool:
    """Whether a value before RoPE is read by one rotation and a router's pool only (case 4)."""
    columns = (aten.slice, aten.chunk, aten.split, aten.split_with_sizes, aten.mul, torch.ops.fluxc.router_pool)
    return all(any(is_call(user, op) for op in columns) for user in x.users)


def _pool_of(turn: Rotation) -> Node | None:
    pools = [user for user in turn.x.users if is_call(user, torch.ops.fluxc.router_pool)]
    return pools[0] if len(pools) == 1 else None


def _fuse(draft: Draft, layer: Layer, blanks: _Blanks) -> str | None:
    """Put the op in; says why not where something reads its results before its operands are there."""
    cache, slots = (argument(layer.write, name) for name in ("cache", "slots")) if layer.write else (None, None)
    lens = argument(layer.pool, "prompt_lens") if layer.pool else None
    tables = [table_of(layer.turns[0].cos), table_of(layer.turns[0].sin)]
    order = {node: place for place, node in enumerate(draft.graph.nodes)}
    known = [*(heads.x for heads in layer.heads), layer.v, *tables, *filter(None, (cache, slots, lens))]
    last = max(known, key=order.__getitem__)
    readers = [user for node in (layer.q, layer.k, layer.pool) if node for user in node.users]
    if any(order[user] <= order[last] for user in readers):
        return f"its results are read before {last.name} is there"
    cache, slots, lens = cache or blanks.cache(layer.k), slots or blanks.slots(), lens or blanks.lens()
    like = layer.turns[0].x
    with draft.inserting_before(_after(last), like):
        operands = [_operand(draft, heads) for heads in layer.heads]
        cos, sin = (_table(draft, table) for table in tables)
        weights = [heads.norm.weight if heads.norm else None for heads in layer.heads]
        args = (*operands, layer.v, *weights, cos, sin, cache, slots, lens)
        fused = draft.call(torch.ops.fluxc.qk_norm_rope_cache.default, args, _settings(layer))
        results = [draft.call(operator.getitem, (fused, i)) for i in range(3 if layer.pool else 2)]
    for node, result in zip((layer.q, layer.k, layer.pool), results, strict=False):
        node.replace_all_uses_with(result)  # type: ignore[union-attr]
    for node in filter(None, (layer.write, layer.pool)):
        draft.graph.erase_node(node)
    renew(draft, results)
    return None


def _after(node: Node) -> Node:
    """The first node at or after the next one that is no placeholder."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following


def _settings(layer: Layer) -> dict[str, Any]:
    epsilons = [heads.norm.eps for heads in layer.heads if heads.norm]
    return {"eps": epsilons[0] if epsilons else 0.0, "pool": argument(layer.pool, "pool") if layer.pool else 0}


def _operand(draft: Draft, heads: Heads) -> Node:
    return draft.call(aten.transpose.int, (heads.x, 1, 2)) if heads.is_moved else heads.x


def _table(draft: Draft, table: Node) -> Node:
    """[B,S,R]."""
    return draft.call(aten.select.int, (table, 1, 0)) if table.meta["val"].dim() == 4 else table
