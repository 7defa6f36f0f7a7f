"""The rows of the demo: every system on every held-out prompt, with the time it took."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fluxc.bench.systems import System
from fluxc.calibrate.runner import answer_loss
from fluxc.data import HELDOUT, TokenizedPrompt, generate
from fluxc.progress import SILENT, Progress
from fluxc.runtime.batch import Batch
from fluxc.runtime.clock import seconds_of, with_stopwatches
from fluxc.runtime.measure import mean_density
from fluxc.runtime.model import FluxModel

SEED = 2000
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Held-out prompts of one kind: tasks that take turns, and a length in tokens."""

    title: str
    tasks: tuple[str, ...]
    length: int


SUITES = (
    Suite("needle outside the window, 2.5K tokens", ("needle",), 2500),
    Suite("needle outside the window, 4K tokens", ("needle",), 4000),
    Suite("prose, 4K tokens", ("prose",), 4000),
    Suite("question after a long irrelevant text, 4K tokens", ("local",), 4000),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One system on one prompt.

    loss: nats a scored token; exact: every scored token the likeliest, None where nothing is asked; sparse_ratio: Ω of
    this prompt; asked: Ω asked for, None where nothing was; seconds: one pass over prompt and answer; attention:
    seconds of the routable attention calls inside it (dense only, else 0); density: share of the causal keys that
    sparse layers read at this length.
    """

    suite: str
    system: str
    prompt: int
    tokens: int
    loss: float
    exact: bool | None
    asked: float | None
    sparse_ratio: float
    seconds: float
    attention: float
    density: float


def rows(
    model: FluxModel, systems: Sequence[System], suites: Sequence[Suite], count: int, progress: Progress = SILENT
) -> list[Row]:
    """`count` prompts of each suite, dense and under every system; the first prompt of a suite is run once before."""
    dense = _dense_runner(model)
    found: list[Row] = []
    for suite in suites:
        progress.start(suite.title, count * (len(systems) + 1))
        prompts = _prompts(model, suite, count)
        dense(_batch(model, prompts[0]))
        for index, prompt in enumerate(prompts):
            for row in _on_prompt(model, systems, prompt, dense):
                found.append(dataclasses.replace(row, suite=suite.title, prompt=index))
                progress.advance()
    return found


Timed = tuple[Tensor, float, float]
"""Logits, seconds, and seconds of the routable attention calls."""


def _on_prompt(
    model: FluxModel, systems: Sequence[System], prompt: TokenizedPrompt, dense: Callable[[Batch], Timed]
) -> Iterator[Row]:
    batch = _batch(model, prompt)
    logits, seconds, attention = dense(batch)
    yield _row(model, prompt, DENSE, 0.0, 0.0, logits, seconds, attention)
    for system in systems:
        result = model.run_routed(batch, system.bias[:, None].to(model.device))
        asked = None if math.isnan(system.budget) else 1 - system.budget
        yield _row(model, prompt, system.name, asked, result.sparse_ratio, result.logits, result.seconds, 0.0)


def _row(
    model: FluxModel,
    prompt: TokenizedPrompt,
    name: str,
    asked: float | None,
    ratio: float,
    logits: Tensor,
    seconds: float,
    attention: float,
) -> Row:
    answer = torch.tensor(prompt.answer_ids, device=logits.device)
    return Row(
        suite="",
        system=name,
        prompt=0,
        tokens=len(prompt),
        loss=float(answer_loss(logits, prompt)),
        exact=bool((logits[0].argmax(-1) == answer).all()) if prompt.asks else None,
        asked=asked,
        sparse_ratio=ratio,
        seconds=seconds,
        attention=attention,
        density=mean_density(model.plan, len(prompt)),
    )


def _dense_runner(model: FluxModel) -> Callable[[Batch], Timed]:
    """Runs the captured program with its attention calls timed."""
    module, watches = with_stopwatches(model.captured_program, model.device)

    @torch.no_grad()
    def run(batch: Batch) -> Timed:
        for watch in watches:
            watch.seconds = 0.0
        out: list[Tensor] = []
        seconds = seconds_of(lambda: out.append(module(*batch.captured())), model.device)
        return out[0], seconds, math.fsum(watch.seconds for watch in watches)

    return run


def _batch(model: FluxModel, prompt: TokenizedPrompt) -> Batch:
    return model.batch(prompt.input_ids, prompt_lens=[prompt.prompt_len], logits_at=[prompt.logits_at])


def _prompts(model: FluxModel, suite: Suite, count: int) -> list[TokenizedPrompt]:
    layer = model.plan.layers[0]
    return generate(suite.tasks, count, model.tokenizer, [suite.length], SEED, HELDOUT, layer.sink, layer.window)
