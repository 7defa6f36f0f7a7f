"""The engine: answers of one model to many requests at a time, from a paged cache whose sparse layers stay small."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self, overload

import numpy as np

from fluxc.engine.backend import stack_routes
from fluxc.engine.conversation import Conversation
from fluxc.engine.handle import Handle
from fluxc.engine.intake import Intake, Routes
from fluxc.engine.memory import pool_pages
from fluxc.engine.options import EngineOptions
from fluxc.engine.request import Request
from fluxc.engine.result import EngineStatus, Generation, KvBytes, Piece
from fluxc.engine.scheduler import Scheduler
from fluxc.engine.sequence import TokenSequence
from fluxc.engine.text import Prompt, is_batch
from fluxc.engine.worker import Worker
from fluxc.errors import DataError, OptionError
from fluxc.plan import Plan


class Engine:
    """Runs the programs of a model under a plan; `fluxc.load` makes one of a model.flux directory.

    `crossover` gives the length in tokens below which a budget's prompts run dense. All methods may be called from any
    thread. Closing it (or leaving a `with` block) ends what still runs.
    """

    def __init__(
        self,
        programs: Any,
        plan: Plan,
        *,
        tokenizer: Any = None,
        eos_ids: Sequence[int] = (),
        crossover: Callable[[float], int] = lambda budget: 0,
        options: EngineOptions | None = None,
    ) -> None:
        self.programs, self.plan, self.tokenizer = programs, plan, tokenizer
        self.options = options or EngineOptions()
        self.crossover = crossover
        self.scheduler = Scheduler(programs, plan, self.options, pool_pages(programs, plan, self.options))
        context = self.options.context_of(programs.context)
        self._intake = Intake(programs, plan, tokenizer, tuple(eos_ids), crossover, self.scheduler.keeper, context)
        self._worker = Worker(self.scheduler)
        self._last: tuple[Generation, ...] = ()
        self._closer = weakref.finalize(self, self._worker.stop, DataError("the engine was closed"))

    @property
    def routes(self) -> Any:
        """Routes bool[L,N] of the N requests of the last `generate`, True for full."""
        known = [found.routes for found in self._last if found.routes is not None]
        return stack_routes(self.programs, known, len(self.plan.layers))

    @property
    def kv_bytes(self) -> KvBytes:
        """Bytes of KV of the requests of the last `generate`, summed, as they were at each one's end."""
        return sum((found.kv_bytes for found in self._last), KvBytes(0, 0, 0))

    @property
    def status(self) -> EngineStatus:
        """What it does now, as seen from outside: exact only while nothing runs."""
        scheduler, pool, size = self.scheduler, self.scheduler.keeper.pool, self.scheduler.keeper.page_bytes
        kept = sum(sequence.holding.pages for sequence in list(scheduler.keeper.idle) if sequence.holding)
        return EngineStatus(
            len(scheduler.active), len(scheduler.waiting), pool.used * size, kept * size, pool.free * size
        )

    def conversation(self) -> Conversation:
        """An empty conversation, whose cache is kept between turns."""
        worker, close = self._worker, self.scheduler.keeper.close

        def forget(sequence: TokenSequence) -> None:
            # A closed engine has nothing left to give back.
            with contextlib.suppress(DataError):
                worker.put(lambda: close(sequence))

        return Conversation(lambda sequence: worker.call(lambda: close(sequence)), forget)

    @overload
    def generate(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> Iterator[Piece]: ...

    @overload
    def generate(self, prompt: Prompt, *, stream: Any = None, **options: Any) -> Generation: ...

    @overload
    def generate(self, prompt: Sequence[Prompt], *, stream: None = None, **options: Any) -> list[Generation]: ...

    def generate(self, prompt: Any, *, stream: bool | Callable[[str], None] | None = None, **options: Any) -> Any:
        """Answer a prompt, or a list of prompts of any lengths together; see `submit` for the options.

        `stream`: True returns an iterator over the pieces, whose closing cancels; a function gets each piece of text.
        For a list, `budget` and `seed` may be lists with one value a prompt, and `routes` may be bool[L,N].
        """
        if is_batch(prompt):
            if stream:
                raise OptionError("stream takes one prompt", hint="submit each, and read their handles")
            return self._collect(self._submit_all(list(prompt), options))
        handle = self.submit(prompt, **options)
        if stream is True:
            return _pieces(handle)
        if callable(stream):
            for piece in _pieces(handle):
                stream(piece.text)
        return self._collect([handle])[0]

    def _submit_all(self, prompts: list[Any], options: dict[str, Any]) -> list[Handle]:
        if options.get("conversation") is not None:
            raise OptionError("a conversation takes one prompt at a time")
        requests = [self.prepare(one, **_row(options, at, len(prompts))) for at, one in enumerate(prompts)]
        return [self._start(request) for request in requests]

    def _collect(self, handles: list[Handle]) -> list[Generation]:
        try:
            found = [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()
        self._last = tuple(found)
        return found

    def submit(
        self,
        prompt: Prompt,
        *,
        budget: float | None = None,
        routes: Routes | None = None,
        conversation: Conversation | None = None,
        reroute: bool = False,
        **generation: Any,
    ) -> Handle:
        """Put a request into the running batch and return at once.

        `prompt`: a text as it is, chat messages, or token ids. `budget`: share of layers that may run full, the plan's
        own by default. `routes` bool[L] forces them. `conversation` continues one, under its first turn's routes, or
        with `reroute` as one prompt that is routed anew. `generation`: see GenerationOptions.

        Raises DataError for a prompt that is empty, past the context, or needs more than the whole pool; OptionError
        for options that are unknown or out of range; PlanError for a bad budget or routes.
        """
        return self._start(
            self.prepare(prompt, budget=budget, routes=routes, conversation=conversation, reroute=reroute, **generation)
        )

    def warm_up(self) -> None:
        """Answer one token through each program, so that the first request waits for no graph to be made."""
        for full in (True, False):
            self.generate([0], routes=[full] * len(self.plan.layers), max_new_tokens=2, eos_token_id=[])
        self._last = ()

    def prepare(self, prompt: Prompt, **options: Any) -> Request:
        """The request that `submit` would put into the batch, checked."""
        return self._intake.request(prompt, **options)

    def _start(self, request: Request) -> Handle:
        def begin() -> None:
            if request.replaces is not None:
                self.scheduler.keeper.close(request.replaces)
            self.scheduler.add(request)

        request.handle.engine = self
        self._worker.put(begin)
        return request.handle

    def close(self) -> None:
        """End all requests; the engine takes no more."""
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pieces(handle: Handle) -> Iterator[Piece]:
    with handle:
        yield from handle


def _row(options: dict[str, Any], at: int, count: int) -> dict[str, Any]:
    """The options of one prompt of a list."""
    row = dict(options)
    for name in ("budget", "seed"):
        value = options.get(name)
        if isinstance(value, (list, tuple)):
            if len(value) != count:
                raise OptionError(f"{len(value)} values of {name} for {count} prompts")
            row[name] = value[at]
    if options.get("routes") is not None:
        flags = np.asarray(options["routes"], bool)
        row["routes"] = flags[:, at] if flags.ndim == 2 and flags.shape[1] == count else flags
    return row
