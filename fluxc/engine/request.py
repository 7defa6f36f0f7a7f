"""One request on its way through the engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from fluxc.engine.backend import Sampler
from fluxc.engine.handle import Handle
from fluxc.engine.likelihood import Likelihood
from fluxc.engine.options import GenerationOptions
from fluxc.engine.result import FinishReason, Generation, KvBytes, Piece, Timings
from fluxc.engine.sequence import TokenSequence
from fluxc.engine.text import TextWriter


@dataclasses.dataclass(eq=False)
class Request:
    """A sequence to be continued. `new` tokens are put behind `sequence` when the request starts.

    `limit`: most tokens of its answer. `full_share`: share of the open layers expected to be full (admission).
    `keep`: called at the end with the result, where the pages stay for a further turn; else they are given back.
    `replaces`: a kept sequence whose pages are given back when this request is queued.
    """

    sequence: TokenSequence
    new: tuple[int, ...]
    options: GenerationOptions
    limit: int
    full_share: float
    sampler: Sampler
    writer: TextWriter
    keep: Callable[[Generation], None] | None = None
    replaces: TokenSequence | None = None
    handle: Handle = dataclasses.field(default_factory=Handle)
    number: int = 0
    requeues: int = 0
    submitted: float = dataclasses.field(default_factory=time.perf_counter)
    started: float | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    stamps: list[float] = dataclasses.field(default_factory=list)

    @property
    def most_cached(self) -> int:
        """Tokens of its sequence that are in the cache in the end at most: the last one is never read."""
        return len(self.sequence.tokens) + len(self.new) + self.limit - len(self.tokens) - 1

    def start(self) -> None:
        """The request is admitted, for the first time or again."""
        self.started = self.started or time.perf_counter()
        self.sequence.tokens.extend(self.new)
        self.new = ()

    def accept(self, token: int, likelihood: Likelihood | None = None) -> FinishReason | None:
        """Take the next token and hand it out; the reason where it is the last."""
        ends = self.sampler.ends(token)
        self.sequence.tokens.append(token)
        self.tokens.append(token)
        self.stamps.append(time.perf_counter())
        reason: FinishReason | None = "stop" if ends else "length" if len(self.tokens) >= self.limit else None
        text = "" if token in self.sampler.eos_ids else self.writer.add(token)
        text += self.writer.finish() if reason else ""
        self.handle.put(Piece(token, text, *(likelihood or ())))
        return reason

    def result(self, reason: FinishReason, kv_bytes: KvBytes) -> Generation:
        """The answer as it is now."""
        sequence = self.sequence
        return Generation(
            text=self.writer.text,
            tokens=tuple(self.tokens),
            prompt_tokens=len(sequence.tokens) + len(self.new) - len(self.tokens),
            routes=sequence.routes,
            scores=sequence.scores,
            finish_reason=reason,
            timings=self._timings(),
            kv_bytes=kv_bytes,
            requeues=self.requeues,
        )

    def _timings(self) -> Timings:
        now = time.perf_counter()
        started = self.started or now
        first = self.stamps[0] if self.stamps else now
        steps = tuple(after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False))
        return Timings(queue=started - self.submitted, prefill=first - started, per_token=steps)
