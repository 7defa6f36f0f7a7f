"""Pages of sequences: what a request needs, what is promised, and which kept conversation gives way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxc.engine import demand
from fluxc.engine.demand import Admission
from fluxc.engine.pool import PagePool
from fluxc.engine.request import Request
from fluxc.engine.result import KvBytes
from fluxc.engine.runner import held
from fluxc.engine.sequence import TokenSequence
from fluxc.engine.shapes import LayerShape
from fluxc.errors import DataError
from fluxc.plan import Plan


class Keeper:
    """The pool of a model's layers. `idle`: kept sequences that no request works on, longest waiting first."""

    def __init__(self, layers: Sequence[LayerShape], plan: Plan, dtype: Any, pages: int, admission: Admission) -> None:
        self.layers, self.plan, self.admission = layers, plan, admission
        self.page_bytes = demand.page_bytes(layers, dtype)
        self.pool = PagePool(pages)
        self.idle: list[TokenSequence] = []

    def demand(self, request: Request) -> int:
        """Pages to be promised to a request when it starts: all it may need, or what it is expected to need."""
        bias, tokens = request.sequence.bias, request.most_cached
        if self.admission == "expected":
            return demand.expected_pages(self.layers, self.plan, bias, tokens, request.full_share)
        return demand.worst_pages(self.layers, self.plan, bias, tokens)

    def check_fits(self, request: Request) -> None:
        """Raise DataError, with the numbers, for a request that the whole pool cannot hold."""
        pages = self.demand(request)
        if pages > self.pool.total:
            size, have = (count * self.page_bytes for count in (pages, self.pool.total))
            raise DataError(
                f"a request of up to {request.most_cached} tokens needs {pages} pages of KV ({size:,} bytes), "
                f"the pool has {self.pool.total} ({have:,} bytes)",
                hint="a shorter prompt, fewer new tokens, a smaller budget, or a larger kv_memory",
            )

    def admit(self, request: Request) -> bool:
        """Promise a request its pages, taking those of idle sequences where that helps; False where it must wait."""
        sequence, wanted = request.sequence, self.demand(request)
        own = sequence.holding.claim if sequence.holding else 0
        others = sum(held(x).pages for x in self.idle if x is not sequence)
        if self.pool.unclaimed + own + others < wanted:
            return False
        while self.pool.unclaimed + own < wanted:
            self.evict(sequence)
        if sequence.holding is None:
            sequence.holding = self.pool.open(len(self.layers))
        if sequence in self.idle:
            self.idle.remove(sequence)
        sequence.holding.reserved = wanted
        return True

    def evict(self, spared: TokenSequence) -> bool:
        """Take the pages of the idle sequence that waits longest; False where there is none."""
        victim = next((x for x in self.idle if x is not spared and x.cached), None)
        if victim is not None:
            self.clear(victim)
        return victim is not None

    def promise(self, sequence: TokenSequence, tokens: int) -> None:
        """Now that the routes are known, promise what `tokens` tokens need under them."""
        routes = [] if sequence.routes is None else sequence.routes.tolist()
        held(sequence).reserved = demand.pages(self.layers, self.plan, routes, tokens)

    def rest(self, sequence: TokenSequence) -> None:
        """The sequence keeps its pages for a further turn."""
        held(sequence).reserved = 0
        self.idle.append(sequence)

    def clear(self, sequence: TokenSequence) -> None:
        """Take the pages of a sequence; it will have to be computed again."""
        self.pool.clear(held(sequence))
        sequence.cached = 0

    def close(self, sequence: TokenSequence) -> None:
        """Take the pages of a sequence and the promise."""
        if sequence in self.idle:
            self.idle.remove(sequence)
        if sequence.holding is not None:
            self.pool.close(sequence.holding)
        sequence.holding, sequence.cached = None, 0

    def kv_bytes(self, sequence: TokenSequence) -> KvBytes:
        """Bytes of KV that a sequence has in the cache."""
        if sequence.holding is None or sequence.routes is None:
            return KvBytes(0, 0, sequence.peak)
        measured = sequence.holding.pages * self.page_bytes
        planned = self.plan.kv_bytes(sequence.routes.tolist(), sequence.cached)
        return KvBytes(planned, measured, max(sequence.peak, measured))
