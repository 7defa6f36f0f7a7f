"""Held-out prompts through one routed program under several routings: what was asked for, what was achieved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc.calibrate.runner import Outcome, run_prompt
from fluxc.data import TokenizedPrompt


@dataclasses.dataclass(frozen=True)
class Summary:
    """Outcomes of one routing over a set of prompts (one task, one group, or all).

    loss: mean over prompts of the mean answer loss in nats; exact: share answered exactly, None where no prompt asks
    anything; full_share: mean share of routable layers that ran full.
    """

    prompts: int
    loss: float
    exact: float | None
    full_share: float

    @property
    def sparse_ratio(self) -> float:
        """Ω: the mean share of routable layers that ran sparse."""
        return 1.0 - self.full_share

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, Ω and perplexity included."""
        extra = {"sparse_ratio": self.sparse_ratio, "perplexity": self.perplexity}
        return dataclasses.asdict(self) | extra


def run_all(
    module: torch.nn.Module,
    prompts: Sequence[TokenizedPrompt],
    bias: Tensor,
    advance: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Each prompt once under the bias [L]."""
    outcomes = []
    for prompt in prompts:
        outcomes.append(run_prompt(module, prompt, bias))
        advance()
    return outcomes


def summarise(outcomes: Sequence[Outcome], prompts: Sequence[TokenizedPrompt]) -> Summary:
    """Plain means over the given prompts; `exact` counts prompts that ask for an answer."""
    asked = [o.exact for o, p in zip(outcomes, prompts, strict=True) if p.asks]
    return Summary(
        prompts=len(outcomes),
        loss=_mean([o.loss for o in outcomes]),
        exact=_mean([float(e) for e in asked]) if asked else None,
        full_share=_mean([o.full_share for o in outcomes]),
    )


def by_task(
    outcomes: Sequence[Outcome], prompts: Sequence[TokenizedPrompt], key: Callable[[str], str] = str
) -> dict[str, Summary]:
    """A summary for each task, or for each group with `key=group_of`."""
    names = sorted({key(prompt.task) for prompt in prompts})
    chosen = {name: [i for i, prompt in enumerate(prompts) if key(prompt.task) == name] for name in names}
    return {name: summarise([outcomes[i] for i in ids], [prompts[i] for i in ids]) for name, ids in chosen.items()}


def input_dependent(routes: Tensor) -> float:
    """Share of layers whose route depends on the prompt: full on more than 5 % and less than 95 % of them.

    routes bool [N,L].
    """
    share = routes.float().mean(0)
    return float(((share > 0.05) & (share < 0.95)).float().mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclasses.dataclass(frozen=True)
class Verification:
    """Held-out prompts, dense and routed at one budget: totals, and by task."""

    dense: dict[str, Summary]
    routed: dict[str, Summary]
    input_dependent: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the key `all` holds the totals."""
        return {
            "dense": {name: summary.to_dict() for name, summary in self.dense.items()},
            "routed": {name: summary.to_dict() for name, summary in self.routed.items()},
            "input_dependent": self.input_dependent,
        }


def verify(
    module: torch.nn.Module,
    prompts: Sequence[TokenizedPrompt],
    bias: Tensor,
    advance: Callable[[], None] = lambda: None,
    dense_module: torch.nn.Module | None = None,
) -> Verification:
    """Run every prompt dense (all routes full) and under the bias [L].

    `dense_module`: the program whose full routes are dense, where those of `module` read blocks.
    """
    dense = run_all(dense_module or module, prompts, torch.full_like(bias, math.inf), advance)
    routed = run_all(module, prompts, bias, advance)
    return Verification(
        dense=_with_total(dense, prompts),
        routed=_with_total(routed, prompts),
        input_dependent=input_dependent(torch.stack([o.routes for o in routed])),
    )


def _with_total(outcomes: Sequence[Outcome], prompts: Sequence[TokenizedPrompt]) -> dict[str, Summary]:
    return {"all": summarise(outcomes, prompts), **by_task(outcomes, prompts)}
