"""From prompts to padded batches. What a step sees depends on the seed and its number alone: runs resume exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxc.data import TokenizedPrompt
from fluxc.runtime.batch import Batch, make_batch

WASTE = 0.1
"""Largest share of padding in a micro-batch."""
IGNORED = -100
"""Target of a row that is padding, as torch's cross entropy has it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt of one step; `slot` is its place in the step's global batch, which seeds its noise."""

    slot: int
    prompt: TokenizedPrompt


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Samples that run together: inputs, the tokens to predict i64[b,N] (IGNORED: none), padded and valid tokens."""

    samples: list[Sample]
    inputs: Batch
    targets: Tensor

    @property
    def padded(self) -> int:
        """Tokens computed, padding included."""
        return self.inputs.input_ids.numel()

    @property
    def valid(self) -> int:
        """Tokens of prompts and answers."""
        return sum(len(sample.prompt) for sample in self.samples)


def step_samples(prompts: Sequence[TokenizedPrompt], step: int, batch: int, seed: int) -> list[Sample]:
    """The global batch of a step: prompts in one random order after another, epoch by epoch."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: _order(len(prompts), seed, epoch) for epoch in {place // len(prompts) for place in places}}
    return [
        Sample(slot, prompts[orders[place // len(prompts)][place % len(prompts)]]) for slot, place in enumerate(places)
    ]


def _order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


def micro_batches(samples: Sequence[Sample], micro_tokens: int, device: str = "cpu") -> list[MicroBatch]:
    """Samples of like length together, padded on the right: at most WASTE padding, and micro_tokens unless alone."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.prompt)):
        if groups and _fits([*groups[-1], sample], micro_tokens):
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [collate(group, device) for group in groups]


def _fits(group: list[Sample], micro_tokens: int) -> bool:
    padded = len(group) * len(group[0].prompt)
    valid = sum(len(sample.prompt) for sample in group)
    return padded <= micro_tokens and padded - valid <= WASTE * padded


def collate(samples: list[Sample], device: str = "cpu") -> MicroBatch:
    """One padded batch; rows of logits past a prompt's own repeat its last and are IGNORED."""
    prompts = [sample.prompt for sample in samples]
    rows = max(prompt.answer_len for prompt in prompts)
    at = [p.logits_at + p.logits_at[-1:] * (rows - p.answer_len) for p in prompts]
    targets = [p.answer_ids + [IGNORED] * (rows - p.answer_len) for p in prompts]
    inputs = make_batch(
        [p.input_ids for p in prompts],
        prompt_lens=[p.prompt_len for p in prompts],
        logits_at=at,
        context=0,
        device=device,
    )
    return MicroBatch(samples, inputs, torch.tensor(targets, device=device))


def logistic_noise(samples: Sequence[Sample], layers: int, step: int, seed: int) -> Tensor:
    """The difference of two Gumbel variables for each layer and sample, f32[L,b]: a function of (seed, step, slot)."""
    columns = [_uniform(layers, f"{seed}/{step}/{sample.slot}") for sample in samples]
    return torch.logit(torch.stack(columns, dim=1), eps=1e-6).float()


def _uniform(count: int, key: str) -> Tensor:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
