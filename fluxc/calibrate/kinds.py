"""Choosing the sparse kind: which one loses less at equal prefill time, with the same layers running full."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.calibrate.runner import run_prompt
from fluxc.data import TokenizedPrompt, group_of
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.kernels import density
from fluxc.passes.apply_plan import ApplyPlan

LAST = 128
"""Rows at the end of the prompt that see all keys in the kind `triangle`."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One kind with its sizes, and the mean answer loss it gave with the same layers full, in nats (None: alone)."""

    settings: SparseSettings
    loss: float | None


def candidates(sink: int, window: int, length: int, decode_full: bool) -> list[SparseSettings]:
    """Streaming as asked, and triangle with the window that makes it equally dense on prompts of `length` tokens."""
    streaming = SparseSettings("streaming", sink, window, 0, decode_full)
    share = density("streaming", length, sink, window, 0)
    low, high = 1, window
    while low < high:
        middle = (low + high + 1) // 2
        if density("triangle", length, sink, middle, LAST) <= share:
            low = middle
        else:
            high = middle - 1
    if density("triangle", length, sink, low, LAST) > share:
        return [streaming]
    return [streaming, SparseSettings("triangle", sink, low, LAST, decode_full)]


def compare(
    program: ExportedProgram,
    layers: Sequence[int],
    options: Sequence[SparseSettings],
    biases: Sequence[Tensor],
    prompts: Sequence[TokenizedPrompt],
    advance: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """Each kind on each prompt under the same biases, each [L]; the chosen one first (see `choose`)."""
    losses = torch.stack([_losses(program, layers, each, biases, prompts, advance) for each in options])
    order = choose(losses, [each.sink + each.window for each in options])
    return [Candidate(options[index], float(losses[index].mean())) for index in order]


def choose(losses: Tensor, slots: Sequence[int]) -> list[int]:
    """The kinds in order of preference, from losses [K,N] on the same N prompts and the KV slots each keeps.

    The least mean loss comes first, unless a kind that keeps less KV is within one standard error of the paired
    differences: a handful of prompts cannot tell these apart, and memory can.
    """
    order = losses.mean(1).argsort().tolist()
    best = order[0]
    for other in sorted(order[1:], key=lambda index: slots[index]):
        if slots[other] < slots[best] and _within_error(losses[other] - losses[best]):
            order.remove(other)
            return [other, *order]
    return order


def _within_error(differences: Tensor) -> bool:
    count = differences.numel()
    return count > 1 and float(differences.mean()) <= float(differences.std() / math.sqrt(count))


def compared_prompts(prompts: Sequence[TokenizedPrompt], count: int) -> list[TokenizedPrompt]:
    """`count` prompts to compare kinds on: groups taking turns, none that are local, whose answers need neither."""
    groups: dict[str, list[TokenizedPrompt]] = {}
    for prompt in prompts:
        groups.setdefault(group_of(prompt.task), []).append(prompt)
    groups.pop("local", None)
    turns = itertools.zip_longest(*groups.values())
    return [prompt for turn in turns for prompt in turn if prompt is not None][:count]


def with_settings(program: ExportedProgram, layers: Sequence[int], settings: SparseSettings) -> ExportedProgram:
    """The program with these settings in every routable layer."""
    return ApplyPlan(dict.fromkeys(layers, settings)).apply(program).program


def _losses(
    program: ExportedProgram,
    layers: Sequence[int],
    settings: SparseSettings,
    biases: Sequence[Tensor],
    prompts: Sequence[TokenizedPrompt],
    advance: Callable[[], None],
) -> Tensor:
    """Mean over the biases, fp32 [N]."""
    module = runnable(with_settings(program, layers, settings))
    losses = torch.zeros(len(biases), len(prompts))
    for column, prompt in enumerate(prompts):
        for row, bias in enumerate(biases):
            losses[row, column] = run_prompt(module, prompt, bias).loss
            advance()
    return losses.mean(0)
