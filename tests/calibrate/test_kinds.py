"""Which sparse kind is preferred, and on which prompts kinds are compared."""

from __future__ import annotations

import torch

from fluxc.calibrate.kinds import choose, compared_prompts
from fluxc.data import TokenizedPrompt

STREAMING, TRIANGLE = 1088, 960


def prompt(task):
    return TokenizedPrompt([1, 2, 3], 2, task)


def test_the_clearly_better_kind_is_chosen_whatever_it_keeps():
    losses = torch.tensor([[0.10, 0.20, 0.10, 0.20], [0.30, 0.41, 0.29, 0.40]])
    assert choose(losses, [STREAMING, TRIANGLE]) == [0, 1]
    assert choose(losses.flip(0), [STREAMING, TRIANGLE]) == [1, 0]


def test_a_tie_goes_to_the_kind_that_keeps_less():
    losses = torch.tensor([[0.10, 0.20, 0.30, 0.20], [0.30, 0.10, 0.10, 0.35]])
    assert losses[0].mean() < losses[1].mean()
    assert choose(losses, [STREAMING, TRIANGLE]) == [1, 0]
    assert choose(losses, [TRIANGLE, STREAMING]) == [0, 1]


def test_one_prompt_shows_no_spread_and_decides_by_loss():
    assert choose(torch.tensor([[0.1], [0.2]]), [STREAMING, TRIANGLE]) == [0, 1]


def test_groups_take_turns_and_local_prompts_are_left_out():
    prompts = [prompt(task) for task in ("needle", "kv", "multi-hop", "prose", "code", "local", "few-shot")]
    assert [p.task for p in compared_prompts(prompts, 4)] == ["needle", "prose", "kv", "code"]
    assert [p.task for p in compared_prompts(prompts, 9)] == ["needle", "prose", "kv", "code", "multi-hop"]
