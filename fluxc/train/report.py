"""What a training run has to say: a line now and then, what held-out prompts showed, and whether routing collapsed."""

from __future__ import annotations

from fluxc.calibrate.verify import Verification
from fluxc.train.trainer import StepRecord

APART = 0.02
"""Difference of full shares below which two tasks are routed alike."""


def said(record: StepRecord, steps: int) -> str:
    """One step in one line."""
    tasks = ", ".join(f"{name} {task.omega:.2f}/{task.target:.2f}" for name, task in sorted(record.tasks.items()))
    return (
        f"step {record.step + 1} of {steps}: answer loss {record.lm:.3f}, tau {record.tau:.2f}, "
        f"padding {record.padding:.0%}, Ω/target {tasks}"
    )


def collapse(verified: Verification) -> list[str]:
    """A line for routers that ignore the prompt: [] where some layer's route depends on it and tasks differ."""
    shares = [summary.full_share for name, summary in verified.routed.items() if name != "all"]
    if verified.input_dependent == 0:
        return ["the routers collapsed: every layer has the same route on all held-out prompts"]
    if len(shares) > 1 and max(shares) - min(shares) < APART:
        return [f"the routers treat all tasks alike: full shares differ by less than {APART:g}"]
    return []
