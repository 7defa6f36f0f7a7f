"""`--budget` and `--sparse-ratio`: the same number said two ways."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from fluxc.budget import budget_of


def budget_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command both options; it receives `budget`, None where neither was given."""

    @functools.wraps(function)
    def wrapped(*args: Any, budget: float | None, sparse_ratio: float | None, **options: Any) -> None:
        function(*args, budget=budget_of(budget, sparse_ratio), **options)

    ratio = click.option("--sparse-ratio", type=float, metavar="Ω", help="The same as --budget, said as 1 - budget.")
    share = click.option(
        "--budget", type=float, metavar="SHARE", help="Largest mean share of routable layers that run full, 0 to 1."
    )
    return share(ratio(wrapped))
