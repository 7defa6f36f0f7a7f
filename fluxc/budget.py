"""Budgets: the share of routable layers that may run full attention, on average over prompts (DESIGN section 1)."""

from __future__ import annotations

import math
from typing import Any

from fluxc.errors import OptionError, PlanError

_HINT = "0.4 lets 40 % of the layers run full attention"


def check_budget(budget: Any) -> float:
    """`budget` itself; raises PlanError unless it is a number in 0..1."""
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not number or math.isnan(budget) or not 0 <= budget <= 1:
        raise PlanError(f"budget {budget!r} is outside 0..1", hint=_HINT)
    return budget


def budget_of(budget: float | None, sparse_ratio: float | None) -> float | None:
    """The budget asked for by `--budget` or by `--sparse-ratio` (1 - budget); None where neither was given.

    Raises OptionError where both were given or the value is outside 0..1.
    """
    if budget is not None and sparse_ratio is not None:
        raise OptionError("--budget and --sparse-ratio say the same thing", hint="give one of them")
    for name, value in (("--budget", budget), ("--sparse-ratio", sparse_ratio)):
        if value is not None and not 0 <= value <= 1:
            raise OptionError(f"{name} {value:g} is outside 0..1", hint=_HINT)
    return budget if sparse_ratio is None else complement(sparse_ratio)


def complement(share: float) -> float:
    """1 - share without rounding noise: the sparse ratio of a budget, and the budget of a sparse ratio."""
    return round(1 - share, 9)
