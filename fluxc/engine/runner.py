"""Runs the programs of a model over the pages of its sequences: prefill, further turns, decode steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fluxc.engine.backend import open_store
from fluxc.engine.decode_batch import DecodeBatch
from fluxc.engine.demand import page_bytes
from fluxc.engine.geometry import Geometry, physical, ring
from fluxc.engine.pool import Holding
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import InternalError
from fluxc.plan import Plan

Room = Callable[[TokenSequence, np.ndarray], bool]
"""Finds pages for lens i64[A] slots of a sequence; False where the sequence had to give up all of its own."""


class Runner:
    """One cache of `pages` pages, and the calls that read and write it. Not to be used by two threads at a time."""

    def __init__(self, programs: Any, plan: Plan, pages: int) -> None:
        self.programs = programs
        self.plan = plan
        self.page_bytes = page_bytes(programs.layers, programs.dtype)
        self.store = open_store(programs, pages)
        self._batch: DecodeBatch | None = None

    @property
    def cache(self) -> Any:
        """The pages [pages,2,Hk,PAGE,D] of all sequences."""
        return self.store.cache

    def decode(self, sequences: Sequence[TokenSequence]) -> Any:
        """One step of decodable sequences whose pages have room for it: logits [B,V]."""
        key = DecodeBatch.key_of(sequences)
        if self._batch is None or self._batch.key != key:
            self._batch = DecodeBatch(sequences)
        logits = self.store.decode(*self._batch.inputs(sequences))
        for sequence in sequences:
            sequence.cached += 1
        return logits

    def prefill(self, sequence: TokenSequence, room: Room) -> Iterator[Any]:
        """All tokens of a sequence that has none in the cache.

        Yields None after each layer and the logits [V] of the last token at the end; ends early where `room` fails.
        """
        prompt, bias = sequence.prompt, sequence.route_bias()
        for item in self.store.prefill(sequence.tokens, prompt, bias, sequence.dense):
            if isinstance(item, Prefilled):
                routes = item.routes.tolist()
                sequence.settle(item.routes, item.scores, Geometry.of(self.programs.layers, self.plan, routes))
                sequence.cached = len(sequence.tokens)
                yield item.logits[0, -1]
            elif self._keep(sequence, item, room):
                yield None
            else:
                return
            # A layer's keys and values must not live on while the next layer is computed.
            del item

    def _keep(self, sequence: TokenSequence, item: LayerKV, room: Room) -> bool:
        """Write what survives of one layer's prefill into pages of its own; False where there is no room."""
        shape, holding = self.programs.layers[item.index], held(sequence)
        routes = {} if shape.row is None else {shape.row: item.route is None or item.route}
        one = Geometry(*np.array([ring(shape, self.plan, routes)], np.int64).T)
        lens = np.zeros_like(holding.counts)
        lens[item.index] = one.lens(len(sequence.tokens))[0]
        if not room(sequence, lens):
            return False
        sequence.peak = max(sequence.peak, holding.pages * self.page_bytes + item.k.nbytes + item.v.nbytes)
        slots = physical(holding.table[item.index, None], one.turn(0, len(sequence.tokens)))
        self.store.write(item.k, item.v, slots)
        return True

    def append(self, sequence: TokenSequence, count: int, room: Room) -> Any:
        """The next `count` tokens on top of what is cached: logits [V] of the last; None where `room` fails."""
        if sequence.geometry is None:
            raise InternalError("a turn was appended to a sequence without routes")
        geometry, start = sequence.geometry, sequence.cached
        if not room(sequence, geometry.lens(start + count)):
            return None
        table = held(sequence).table
        slots = physical(table, geometry.turn(start, count))
        logits = self.store.append(
            np.array([sequence.tokens[start : start + count]]),
            np.arange(start, start + count)[None],
            np.array([count]),
            slots[:, None],
            table[:, None],
            geometry.lens(start)[:, None].astype(np.int32),
            np.array([start]),
            geometry.sinks[:, None],
            geometry.windows[:, None],
            np.array([[count - 1]]),
        )
        sequence.cached += count
        return logits[0, -1]


def held(sequence: TokenSequence) -> Holding:
    """The pages of a sequence that was admitted."""
    if sequence.holding is None:
        raise InternalError("a sequence is computed that was not admitted")
    return sequence.holding
