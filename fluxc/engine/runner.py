"""Runs the programs of a model over the pages of its sequences: prefill, further turns, decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fluxc import kernels
from fluxc.engine.decode_batch import DecodeBatch
from fluxc.engine.demand import page_bytes
from fluxc.engine.geometry import Geometry, physical, ring
from fluxc.engine.pool import Holding
from fluxc.engine.programs import LayerKV, Prefilled, Programs
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import InternalError
from fluxc.kernels.schemas import PAGE
from fluxc.plan import Plan

Room = Callable[[TokenSequence, Tensor], bool]
"""Finds pages for lens i64[A] slots of a sequence; False where the sequence had to give up all of its own."""


class Runner:
    """One cache of `pages` pages, and the calls that read and write it. Not to be used by two threads at a time."""

    def __init__(self, programs: Programs, plan: Plan, pages: int) -> None:
        kernels.register()
        self.programs = programs
        self.plan = plan
        shape = programs.layers[0]
        self.page_bytes = page_bytes(programs.layers, programs.dtype)
        sizes = (pages, 2, shape.kv_heads, PAGE, shape.head_dim)
        self.cache = torch.empty(sizes, dtype=programs.dtype, device=programs.device)
        self._batch: DecodeBatch | None = None

    @torch.no_grad()
    def decode(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """One step of decodable sequences whose pages have room for it: logits [B,V]."""
        key = DecodeBatch.key_of(sequences)
        if self._batch is None or self._batch.key != key:
            self._batch = DecodeBatch(sequences, self.programs.device)
        logits = self.programs.decode(self.cache, *self._batch.inputs(sequences))
        for sequence in sequences:
            sequence.cached += 1
        return logits

    def prefill(self, sequence: TokenSequence, room: Room) -> Iterator[Tensor | None]:
        """All tokens of a sequence that has none in the cache.

        Yields None after each layer and the logits [V] of the last token at the end; ends early where `room` fails.
        """
        for item in self._prefill_items(sequence):
            if isinstance(item, Prefilled):
                routes = item.routes.flatten().tolist()
                sequence.settle(item.routes, item.scores, Geometry.of(self.programs.layers, self.plan, routes))
                sequence.cached = len(sequence.tokens)
                yield item.logits[0, -1]
            elif self._keep(sequence, item, room):
                yield None
            else:
                return
            # A layer's keys and values must not live on while the next layer is computed.
            del item

    def _prefill_items(self, sequence: TokenSequence) -> Iterator[LayerKV | Prefilled]:
        device = self.programs.device
        ids = torch.tensor([sequence.tokens], device=device)
        prompt, last = (torch.tensor([at], device=device) for at in (sequence.prompt, len(sequence.tokens) - 1))
        bias = sequence.route_bias().to(device)
        with torch.no_grad():
            items = iter(self.programs.prefill(ids, prompt, bias, last[:, None], dense=sequence.dense))
        while True:
            # Not around the loop: between two items another caller's grad mode would be changed.
            with torch.no_grad():
                item = next(items, None)
            if item is None:
                return
            yield item
            del item

    def _keep(self, sequence: TokenSequence, item: LayerKV, room: Room) -> bool:
        """Write what survives of one layer's prefill into pages of its own; False where there is no room."""
        shape, holding = self.programs.layers[item.index], held(sequence)
        routes = {} if shape.row is None else {shape.row: item.route is None or item.route}
        one = Geometry(*torch.tensor([ring(shape, self.plan, routes)]).unbind(1))
        lens = torch.zeros_like(holding.counts)
        lens[item.index] = one.lens(len(sequence.tokens))[0]
        if not room(sequence, lens):
            return False
        sequence.peak = max(sequence.peak, holding.pages * self.page_bytes + item.k.nbytes + item.v.nbytes)
        slots = physical(holding.table[item.index, None], one.turn(0, len(sequence.tokens)))
        self._write(item.k, item.v, slots)
        return True

    @torch.no_grad()
    def _write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """k, v [1,Hk,S,D] to slots i64[1,S]; a ring keeps few of a long prompt, so only those are handed on."""
        kept = (slots[0] >= 0).nonzero().flatten()
        if len(kept) < slots.shape[1]:
            at = kept.to(k.device)
            k, v, slots = k.index_select(2, at), v.index_select(2, at), slots[:, kept]
        torch.ops.fluxc.kv_write(self.cache, k, v, slots.to(self.programs.device))

    @torch.no_grad()
    def append(self, sequence: TokenSequence, count: int, room: Room) -> Tensor | None:
        """The next `count` tokens on top of what is cached: logits [V] of the last; None where `room` fails."""
        if sequence.geometry is None:
            raise InternalError("a turn was appended to a sequence without routes")
        geometry, start = sequence.geometry, sequence.cached
        if not room(sequence, geometry.lens(start + count)):
            return None
        table = held(sequence).table
        slots = physical(table, geometry.turn(start, count))
        positions = torch.arange(start, start + count)
        inputs = (
            torch.tensor([sequence.tokens[start : start + count]]),
            positions[None],
            torch.tensor([count]),
            slots[:, None],
            table[:, None],
            geometry.lens(start)[:, None].to(torch.int32),
            torch.tensor([start]),
            geometry.sinks[:, None],
            geometry.windows[:, None],
            torch.tensor([[count - 1]]),
        )
        logits = self.programs.append(self.cache, *(x.to(self.programs.device) for x in inputs))
        sequence.cached += count
        return logits[0, -1]


def held(sequence: TokenSequence) -> Holding:
    """The pages of a sequence that was admitted."""
    if sequence.holding is None:
        raise InternalError("a sequence is computed that was not admitted")
    return sequence.holding
