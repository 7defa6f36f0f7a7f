"""Batches: padding, order and noise that depend on seed and step alone."""

from __future__ import annotations

import random

import pytest
import torch

from fluxc.calibrate.runner import answer_loss
from fluxc.calibrate.verify import Summary, Verification
from fluxc.data import TokenizedPrompt
from fluxc.train.batches import WASTE, collate, logistic_noise, micro_batches, step_samples
from fluxc.train.objective import Multipliers, Seen, answer_losses, divergences, penalty
from fluxc.train.report import collapse


def prompts(count=40, shortest=50, longest=400):
    rng = random.Random(1)
    sizes = [rng.randint(shortest, longest) for _ in range(count)]
    return [TokenizedPrompt([rng.randrange(30) for _ in range(size)], size - 1 - size % 7, "kv") for size in sizes]


def test_every_prompt_comes_once_an_epoch():
    made = prompts(10)
    slots = [sample for step in range(5) for sample in step_samples(made, step, 4, seed=3)]
    for epoch in (slots[:10], slots[10:]):
        assert sorted(id(sample.prompt) for sample in epoch) == sorted(map(id, made))
    assert [id(s.prompt) for s in slots[:10]] != [id(s.prompt) for s in slots[10:]]
    assert [s.prompt for s in step_samples(made, 2, 4, 3)] == [s.prompt for s in slots[8:12]]
    assert [s.prompt for s in step_samples(made, 0, 10, 4)] != [s.prompt for s in slots[:10]]


@pytest.mark.parametrize("micro_tokens", [1, 500, 2000, 10**9])
def test_micro_batches_pad_little_and_lose_nothing(micro_tokens):
    samples = step_samples(prompts(), 0, 40, 0)
    parts = micro_batches(samples, micro_tokens)
    assert sorted(sample.slot for part in parts for sample in part.samples) == list(range(40))
    for part in parts:
        assert 1 - part.valid / part.padded <= WASTE
        assert part.padded <= micro_tokens or len(part.samples) == 1
    assert len(parts) < 40 or micro_tokens <= 500


def test_padded_rows_predict_what_single_ones_do():
    samples = step_samples(prompts(6, 20, 30), 0, 6, 0)
    part = collate(samples)
    logits = torch.randn(6, part.targets.shape[1], 30, generator=torch.Generator().manual_seed(0))
    for row, sample in enumerate(samples):
        size = sample.prompt.answer_len
        assert part.inputs.logits_at[row, :size].tolist() == sample.prompt.logits_at
        expected = answer_loss(logits[row : row + 1, :size], sample.prompt)
        torch.testing.assert_close(answer_losses(logits, part.targets)[row], expected)
    assert divergences(logits, logits, part.targets).abs().max() < 1e-6
    assert (divergences(logits, -logits, part.targets) > 0).all()


def test_noise_is_a_function_of_seed_step_and_slot():
    samples = step_samples(prompts(), 4, 8, 0)
    whole = logistic_noise(samples, 5, 4, seed=0)
    assert torch.equal(logistic_noise(samples[3:5], 5, 4, 0), whole[:, 3:5])
    assert not torch.equal(logistic_noise(samples, 5, 5, 0), whole)
    assert not torch.equal(logistic_noise(samples, 5, 4, 1), whole)


def test_noise_is_logistic():
    drawn = torch.cat([logistic_noise(step_samples(prompts(), s, 40, 0), 30, s, 0).flatten() for s in range(20)])
    # Variance of a logistic variable: pi^2 / 3.
    assert abs(float(drawn.mean())) < 0.05
    assert abs(float(drawn.var()) - 3.29) < 0.1


def test_penalty_of_parts_has_the_gradient_of_the_whole_at_equal_gaps():
    multipliers = Multipliers({"a": 0.4, "b": 0.9}, 2.0)
    weights = torch.tensor([[0.2, 0.2, 0.7, 0.7]], requires_grad=True)
    tasks = multipliers.index(["a", "b", "a", "b"])
    found = []
    for parts in ([[0, 1, 2, 3]], [[0, 1], [2, 3]]):
        seen = Seen.none(multipliers)
        total = sum(penalty(weights[:, p], tasks[p], multipliers, seen, 4, lambda x: x) for p in parts)
        found.append((seen.omega(), torch.autograd.grad(total, weights)[0]))
    assert torch.equal(found[0][0], found[1][0])
    gaps = found[0][0] - multipliers.targets
    expected = -(2.0 * gaps.sign() + 4.0 * gaps) / 4
    torch.testing.assert_close(found[0][1], expected.repeat(2)[None])
    torch.testing.assert_close(found[1][1][:, 2:], expected[None])


def test_multipliers_rise_while_a_target_is_missed_and_stay_above_zero():
    multipliers = Multipliers({"a": 0.5}, 0.0)
    price = penalty(torch.ones(2, 3), multipliers.index(["a"] * 3), multipliers, Seen.none(multipliers), 3, lambda x: x)
    (grad,) = torch.autograd.grad(price, multipliers.values)
    torch.testing.assert_close(grad, torch.tensor([[0.5, 0.25]]))
    multipliers.values.data.fill_(-1.0)
    multipliers.clamp()
    assert (multipliers.values == 0).all()


@pytest.mark.parametrize(
    ("shares", "dependent", "said"),
    [
        ((0.5, 0.5), 0.0, "collapsed: every layer has the same route"),
        ((0.50, 0.51), 0.5, "treat all tasks alike"),
        ((0.2, 0.6), 0.5, ""),
    ],
)
def test_collapse_is_said(shares, dependent, said):
    routed = {name: Summary(4, 1.0, None, share) for name, share in zip(("kv", "local"), shares, strict=True)}
    found = collapse(Verification(routed, {"all": routed["kv"], **routed}, dependent))
    assert said in "".join(found)
    assert bool(found) == bool(said)
