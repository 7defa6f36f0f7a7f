"""The routings of an evaluation: the plan at each budget, and what it is compared with at the same Ω.

Independent ones are known before anything runs. Dependent ones have as many full layers as the plan had: `random` and
the oracles on each prompt, `best static`, whose layers are the same for all prompts, on the mean over the suite
(rounded up, which is not to our advantage).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from fluxc.bench.systems import System, controls, plan_name
from fluxc.calibrate.runner import forced
from fluxc.data import TokenizedPrompt
from fluxc.evaluate.scorer import Sample

Kind = Literal["fluxc", "best static", "random", "oracle ranking", "oracle greedy"]


@dataclasses.dataclass(frozen=True)
class Follower:
    """A routing that follows the plan at one budget: it gets as many full layers."""

    kind: Kind
    budget: float

    @property
    def name(self) -> str:
        """What it is called in rows and tables."""
        return f"{self.kind} {self.budget:g}"


class StaticLayers(Protocol):
    """Chooses the static layers: the bias [L] with `count` layers full, the same for every prompt."""

    def __call__(self, count: int) -> Tensor: ...


def independent(layers: int, bias_at: Callable[[float], Tensor], budgets: Sequence[float]) -> list[System]:
    """Dense, every second layer, all sparse, and the plan at each budget."""
    return [*controls(layers), *(System(plan_name(budget), bias_at(budget), budget) for budget in budgets)]


def followers(budgets: Sequence[float], static: bool, oracle: str) -> list[Follower]:
    """The routings beside the plan at each budget."""
    kinds: list[Kind] = [*(["best static"] if static else []), "random"]  # type: ignore[list-item]
    if oracle:
        kinds.append(f"oracle {oracle}")  # type: ignore[arg-type]
    return [Follower(kind, budget) for budget in budgets for kind in kinds]


def full_layers(sample: Sample) -> int:
    """Layers that ran full."""
    return sample["routes"].count("1")


def random_bias(prompt: TokenizedPrompt, layers: int, count: int, seed: int) -> Tensor:
    """`count` layers full, drawn for this prompt alone."""
    # The text of a prompt names its stream: the draw does not depend on which prompts came before.
    drawn = random.Random(f"{seed}/{layers}/{count}/{prompt.input_ids}")
    chosen = set(drawn.sample(range(layers), count))
    return forced([index in chosen for index in range(layers)])


def mean_count(samples: Sequence[Sample]) -> int:
    """Full layers of the static choice beside these samples: their mean, rounded up."""
    # A mean of whole numbers may come out a hair above one.
    return math.ceil(sum(map(full_layers, samples)) / len(samples) - 1e-9)
