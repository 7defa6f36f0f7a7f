"""Sums of rows: the right prompts, the right intervals, and cells that do not count."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fluxc.evaluate.summary import summaries, wilson


def rows(task: str, **systems: str) -> list[dict[str, Any]]:
    """`dense="1101"`: that system is right on prompts 0, 1 and 3; routes of two layers by system."""
    routes = {"dense": "11", "sparse": "00"}
    made = []
    for name, hits in systems.items():
        for prompt, hit in enumerate(hits):
            row = {"suite": "s", "task": task, "length": 100, "prompt": prompt, "tokens": 100, "budget": None}
            name = "all sparse" if name == "sparse" else name
            loss = 0.5 if hit == "1" else 1.5
            made.append({**row, "system": name, "loss": loss, "exact": hit == "1", "routes": routes.get(name, "10")})
    return made


def entry(found: list[dict[str, Any]], system: str, scope: str = "all") -> dict[str, Any]:
    return next(x for x in found if x["system"] == system and x["scope"] == scope)


def test_wilson_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((81 / 263, 0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20)[2] == 1.0


def test_means_and_paired_differences() -> None:
    found = summaries(rows("needle", dense="1111", fluxc="1110", sparse="0000"), shortest=1)
    ours = entry(found, "fluxc")
    assert ours["exact"][0] == 0.75
    assert ours["exact_less_dense"][0] == -0.25
    assert ours["perplexity_over_dense"][0] == pytest.approx(math.exp(0.25))
    assert ours["sparse_ratio"] == 0.5
    assert entry(found, "dense")["perplexity_over_dense"] == [1.0, 1.0, 1.0]
    assert entry(found, "dense")["exact_less_dense"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("task", "dense", "sparse", "counts"),
    [
        ("needle", "1111111111", "1000000000", True),
        ("needle", "1111111111", "1100000000", False),
        ("questions", "0000", "0000", False),
        ("local", "1111", "1111", True),
    ],
)
def test_cells_that_all_sparse_answers_do_not_count(task: str, dense: str, sparse: str, counts: bool) -> None:
    found = summaries(rows(task, dense=dense, sparse=sparse), shortest=1)
    assert {x["counts"] for x in found} == {counts}


def test_short_prompts_are_reported_apart() -> None:
    made = rows("needle", dense="11", fluxc="11")
    made[2]["tokens"], made[2]["routes"] = 10, "11"
    ours = entry(summaries(made, shortest=50), "fluxc")
    assert (ours["sparse_ratio"], ours["short"], ours["prompts"]) == (0.5, 1, 2)


def test_lengths_are_cells_of_their_own() -> None:
    made = rows("needle", dense="11", sparse="00")
    for row in made:
        row["length"] = 100 + row["prompt"]
    scopes = {x["scope"] for x in summaries(made, shortest=1)}
    assert scopes == {"all", "needle", "needle @ 100", "needle @ 101"}
