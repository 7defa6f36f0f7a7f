"""The check after every capture: the program computes what the source model computes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fluxc.errors import SelfCheckError
from fluxc.ir.graph import runnable

# Largest difference of two logits over the largest logit. fp32: sums in another order; half precision (only models too
# large for an fp32 copy): rounding steps of the format (2^-8, 2^-11), many layers deep.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}
LENGTHS = (1, 7, 33)
# Windows and original contexts up to this many tokens are crossed by one more length.
_CROSSABLE = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: a batch of `batch` rows of `length` tokens, the first at position `start`."""

    batch: int
    length: int
    start: int = 0


def cases(context: int, edges: list[int]) -> list[Case]:
    """Three lengths, two batches, one start past 0, and one length past each small window or original context.

    `context` 0: the model does not say how many positions it has.
    """
    context = context or _CROSSABLE
    lengths = [*LENGTHS, *(edge + 3 for edge in sorted(set(edges)) if 0 < edge <= _CROSSABLE)]
    usable = sorted({min(length, context) for length in lengths})
    wanted = [Case(1, length) for length in usable]
    middle = min(7, context)
    wanted.append(Case(2, middle))
    if context >= middle + 3:
        wanted.append(Case(1, middle, start=3))
    return wanted


def self_check(program: ExportedProgram, reference: Any, context: int, edges: list[int]) -> dict[str, Any]:
    """Compare on random tokens; returns {"lengths", "max_error", "tolerance", "dtype"}.

    `reference` is a twin of the source under eager attention. Errors are relative to the largest logit. Raises
    SelfCheckError naming the first length that differs.
    """
    module = runnable(program)
    dtype = next(p.dtype for p in reference.parameters() if p.is_floating_point())
    tolerance, worst, name = TOLERANCE.get(dtype, 1e-4), 0.0, str(dtype).removeprefix("torch.")
    tried = cases(context, edges)
    for case in tried:
        error = _error(module, reference, case)
        if not error <= tolerance:
            raise SelfCheckError(
                f"the captured program differs from the source by {error:.2e} of the largest logit at length "
                f"{case.length}, batch {case.batch}, first position {case.start} (tolerance {tolerance:.0e})"
            )
        worst = max(worst, error)
    return {"lengths": sorted({c.length for c in tried}), "max_error": worst, "tolerance": tolerance, "dtype": name}


def _error(module: torch.nn.Module, reference: Any, case: Case) -> float:
    tokens, positions = _tokens(reference, case)
    rows = torch.arange(case.length, device=tokens.device).expand(case.batch, -1)
    lens = torch.full((case.batch,), case.length, device=tokens.device)
    with torch.no_grad():
        got: Tensor = module(tokens, positions, lens, rows).float()
        want: Tensor = reference(input_ids=tokens, position_ids=positions, use_cache=False).logits.float()
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def _tokens(reference: Any, case: Case) -> tuple[Tensor, Tensor]:
    embedding = reference.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(case.length)
    shape = (case.batch, case.length)
    tokens = torch.randint(embedding.shape[0], shape, generator=generator).to(embedding.device)
    positions = torch.arange(case.start, case.start + case.length, device=embedding.device)
    return tokens, positions.expand(shape)
