"""What must hold before a random model is timed: routed equals dense, and a decode step what prefill computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxc.bench.shape_model import RandomModel
from fluxc.bench.shape_rows import Row
from fluxc.engine import demand
from fluxc.engine.pool import PagePool
from fluxc.engine.runner import Runner
from fluxc.engine.sequence import TokenSequence
from fluxc.errors import SelfCheckError
from fluxc.runtime.measure import spread_routes

TOLERANCE = 0.2
"""Largest relative difference of logits. With 36 layers in bf16, equal values computed by other kernels differ by about
0.02; logits under another mask or after another token by 0.6."""


@torch.no_grad()
def check(model: RandomModel, seed: int = 0) -> Row:
    """Relative differences of the last logits: all-full routed to dense, decode to prefill dense and half sparse.

    `half_to_full` says what difference a wrong mask makes. The prompt is half as long again as a sparse row's keys.
    Raises SelfCheckError where one of the others is above TOLERANCE.
    """
    layers, sizes = len(model.plan.layers), model.shape.sparse
    length = (sizes.sink + sizes.window) * 3 // 2
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, model.shape.vocabulary, (length + 1,), generator=generator).tolist()
    full, half = [True] * layers, spread_routes(layers, 0.5)
    whole = _Run(model, tokens, length + 1)
    found = {"all_full": _difference(whole.prefill(full), whole.prefill(full, dense=True))}
    for name, routes in (("decode_full", full), ("decode_half", half)):
        found[name] = _difference(_Run(model, tokens, length).decoded(routes), whole.prefill(routes, prompt=length))
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
    if wrong:
        raise SelfCheckError(f"logits differ by {wrong}", hint="no times are shown; this is a fault of fluxc")
    other = _difference(whole.prefill(half), whole.prefill(full))
    return {"length": length, "tolerance": TOLERANCE, **found, "half_to_full": other}


class _Run:
    """Prefills of the first `count` tokens over a pool of their own."""

    def __init__(self, model: RandomModel, tokens: list[int], count: int) -> None:
        layers = model.programs.layers
        pages = demand.pages(layers, model.plan, [True] * len(model.plan.layers), count + 1)
        self._model, self._tokens, self._count = model, tokens, count
        self._pool = PagePool(pages)
        self._runner = Runner(model.programs, model.plan, pages)

    def prefill(self, routes: Sequence[bool], *, prompt: int = 0, dense: bool = False) -> Tensor:
        """Logits [V] of the last token; `prompt` tokens chose the routes, by default all."""
        sequence, logits = self._prefilled(routes, prompt or self._count, dense)
        self._pool.close(sequence.holding)  # type: ignore[arg-type]
        return logits

    def decoded(self, routes: Sequence[bool]) -> Tensor:
        """Logits [V] of the token after the first `count`, by a decode step."""
        sequence, _ = self._prefilled(routes, self._count, dense=False)
        sequence.tokens.append(self._tokens[self._count])
        assert sequence.geometry is not None
        assert sequence.holding is not None
        self._pool.grow(sequence.holding, sequence.geometry.lens(self._count + 1))
        logits = self._runner.decode([sequence])[0].float()
        self._pool.close(sequence.holding)
        return logits

    def _prefilled(self, routes: Sequence[bool], prompt: int, dense: bool) -> tuple[TokenSequence, Tensor]:
        holding = self._pool.open(len(self._model.programs.layers))
        bias = self._model.bias(list(routes))
        sequence = TokenSequence(self._tokens[: self._count], prompt, bias, dense, holding)
        logits: Tensor | None = None
        for item in self._runner.prefill(sequence, lambda _, lens: self._pool.grow(holding, lens)):
            logits = item
        assert logits is not None, "a prefill ends with the logits of its last token"
        return sequence, logits.float()


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
