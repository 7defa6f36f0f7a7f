"""Which request computes next: continuous batching over one pool of pages.

One call of `step` does at most one decode step of all running requests, and before it as much of one prefill (or of one
further turn) as `max_decode_stall_ms` allows, at least one layer. Requests start in the order they came. Where pages
run out, kept conversations lose theirs first, then the youngest request is put back into the queue: it keeps its tokens
and routes, and is computed again. Nothing here knows of threads: whoever calls `step` owns the scheduler.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fluxc.engine.keeper import Keeper
from fluxc.engine.likelihood import Likelihood, likelihood
from fluxc.engine.options import EngineOptions
from fluxc.engine.request import Request
from fluxc.engine.result import FinishReason, KvBytes
from fluxc.engine.runner import Runner, held
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import DataError
from fluxc.kernels.schemas import PAGE
from fluxc.plan import Plan


class Scheduler:
    """Requests of one model over a pool of `pages` pages."""

    def __init__(self, programs: Any, plan: Plan, options: EngineOptions, pages: int) -> None:
        self.programs, self.options = programs, options
        self.runner = Runner(programs, plan, pages)
        self.keeper = Keeper(programs.layers, plan, programs.dtype, pages, options.admission)
        self.waiting: list[Request] = []
        self.active: list[Request] = []
        self._work: tuple[Request, Iterator[Any]] | None = None
        self._count = 0
        self._decoded_at = time.perf_counter()

    @property
    def busy(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self.waiting or self.active)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self._count += 1
        request.number = self._count
        self.waiting.append(request)

    def step(self) -> bool:
        """Do a piece of work; whether there is more."""
        self._drop_cancelled()
        self._advance()
        self._decode()
        return self.busy

    def fail_all(self, fault: BaseException) -> None:
        """End every request with `fault`."""
        for request in [*self.active, *self.waiting]:
            self._fail(request, fault)

    def _drop_cancelled(self) -> None:
        for request in [*self.active, *self.waiting]:
            if request.handle.cancelled:
                self._finish(request, "cancelled")

    def _advance(self) -> None:
        """Go on with the prefill or turn at hand, for as long as decoding may wait for it."""
        until = self._decoded_at + self.options.max_decode_stall_ms / 1000
        while self._work or self._begin():
            self._advance_once()
            if not any(map(self._steps, self.active)) or time.perf_counter() >= until:
                return

    def _begin(self) -> bool:
        """Take up the oldest request that needs more than a decode step, an active one first."""
        request = next((r for r in self.active if not self._steps(r)), None) or self._admit()
        if request:
            self._work = request, self._compute(request)
        return request is not None

    def _admit(self) -> Request | None:
        if not self.waiting or len(self.active) >= self.options.max_batch:
            return None
        request = self.waiting[0]
        try:
            self.keeper.check_fits(request)
        except DataError as fault:
            self._fail(request, fault)
            return None
        if not self.keeper.admit(request):
            return None
        self.active.append(self.waiting.pop(0))
        request.start()
        return request

    def _advance_once(self) -> None:
        if self._work is None:
            return
        request, work = self._work
        try:
            logits = next(work, None)
        except Exception as fault:
            self._fail(request, fault)
            return
        if logits is not None and not request.sequence.pending:
            self._work = None
            self.keeper.promise(request.sequence, request.most_cached)
            self._accept([request], logits[None])
        elif request not in self.active or self._steps(request):
            self._work = None

    def _compute(self, request: Request) -> Iterator[Any]:
        """Yields while tokens of the request are put into the cache; the last item are the logits of its last token."""
        sequence = request.sequence
        while sequence.pending and request in self.active:
            if self._outgrown(sequence):
                self.keeper.clear(sequence)
            if sequence.cached:
                count = min(sequence.pending, self.options.turn_tokens)
                yield self.runner.append(sequence, count, self._room)
            else:
                yield from self.runner.prefill(sequence, self._room)

    def _outgrown(self, sequence: TokenSequence) -> bool:
        """Whether the cached keys were rotated for shorter texts than this one is by now."""
        return 0 < sequence.cached <= self.programs.rope_limit < len(sequence.tokens)

    def _steps(self, request: Request) -> bool:
        """Whether a decode step is all that the request needs next."""
        return request.sequence.decodable and not self._outgrown(request.sequence)

    def _room(self, sequence: TokenSequence, lens: np.ndarray) -> bool:
        """Pages for lens i64[A] slots; False where the sequence itself was put back into the queue for them."""
        while not self.keeper.pool.grow(held(sequence), lens):
            if not self.keeper.evict(sequence) and not self._put_back(sequence):
                return False
        return True

    def _put_back(self, sequence: TokenSequence) -> bool:
        """Put the youngest request back into the queue; False where that is the one of `sequence`."""
        victim = max(self.active, key=lambda request: request.number)
        if len(self.active) == 1:
            raise DataError(
                f"a request of {len(sequence.tokens)} tokens needs more than all "
                f"{self.keeper.pool.total} pages of the pool",
                hint='a larger kv_memory, or admission "worst" to refuse it before it starts',
            )
        self._stop_work(victim)
        self.active.remove(victim)
        self.keeper.close(victim.sequence)
        victim.requeues += 1
        bisect.insort(self.waiting, victim, key=lambda request: request.number)
        return victim.sequence is not sequence

    def _stop_work(self, request: Request) -> None:
        if self._work and self._work[0] is request:
            self._work = None

    def _decode(self) -> None:
        """One token of every request that has one to decode."""
        for request in [r for r in self.active if self._steps(r)]:
            if request in self.active:
                self._make_decodable(request)
        rows = [r for r in self.active if self._steps(r)]
        if rows:
            logits = self.runner.decode([r.sequence for r in rows])
            self._decoded_at = time.perf_counter()
            self._accept(rows, logits)

    def _make_decodable(self, request: Request) -> None:
        """A page for the next token where it begins one: slots of all layers grow alike until a ring is full."""
        sequence = request.sequence
        if sequence.cached % PAGE or sequence.geometry is None:
            return
        try:
            self._room(sequence, sequence.geometry.lens(sequence.cached + 1))
        except DataError as fault:
            self._fail(request, fault)

    def _accept(self, rows: list[Request], logits: Any) -> None:
        """Choose the next token of each row by logits [B,V]."""
        likely: list[int] = logits.argmax(-1).tolist() if any(r.sampler.greedy for r in rows) else []
        for at, request in enumerate(rows):
            try:
                token = likely[at] if request.sampler.greedy else request.sampler.choose(logits[at])
                reason = request.accept(token, _likelihood(request, logits[at], token))
            except Exception as fault:
                self._fail(request, fault)
                continue
            if reason:
                self._finish(request, reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        result = request.result(reason, self.keeper.kv_bytes(request.sequence))
        self._leave(request, stays=request.keep is not None and reason != "cancelled")
        if request.keep:
            request.keep(result)
        request.handle.finish(result)

    def _fail(self, request: Request, fault: BaseException) -> None:
        self._leave(request, stays=False)
        if request.keep:
            request.keep(request.result("cancelled", KvBytes(0, 0, 0)))
        request.handle.finish(fault)

    def _leave(self, request: Request, stays: bool) -> None:
        """Out of the queue or the batch. A turn that has not begun leaves its conversation's pages alone."""
        self._stop_work(request)
        if request in self.waiting:
            self.waiting.remove(request)
            return
        self.active.remove(request)
        if stays:
            self.keeper.rest(request.sequence)
        else:
            self.keeper.close(request.sequence)


def _likelihood(request: Request, logits: Any, token: int) -> Likelihood | None:
    wanted = request.options.logprobs
    return None if wanted is None else likelihood(logits, token, wanted)
