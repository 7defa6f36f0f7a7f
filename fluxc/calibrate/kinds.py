"""Choosing the sparse kind: which one loses less at equal prefill time, with the same layers running full."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.calibrate.runner import run_prompt
from fluxc.data import TokenizedPrompt
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
    bias: Tensor,
    prompts: Sequence[TokenizedPrompt],
    advance: Callable[[], None] = lambda: None,
) -> list[Candidate]:
    """Each kind on each prompt under the same bias [L]; best first."""
    found = [Candidate(each, _loss(program, layers, each, bias, prompts, advance)) for each in options]
    return sorted(found, key=lambda candidate: candidate.loss or 0.0)


def with_settings(program: ExportedProgram, layers: Sequence[int], settings: SparseSettings) -> ExportedProgram:
    """The program with these settings in every routable layer."""
    return ApplyPlan(dict.fromkeys(layers, settings)).apply(program).program


def _loss(
    program: ExportedProgram,
    layers: Sequence[int],
    settings: SparseSettings,
    bias: Tensor,
    prompts: Sequence[TokenizedPrompt],
    advance: Callable[[], None],
) -> float:
    module = runnable(with_settings(program, layers, settings))
    losses = []
    for prompt in prompts:
        losses.append(run_prompt(module, prompt, bias).loss)
        advance()
    return sum(losses) / len(losses)
