"""What the numbers of an evaluation depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxc.artifact import versions
from fluxc.data.haystack import Texts
from fluxc.evaluate.options import EvalOptions
from fluxc.evaluate.subjects import FluxSubject, Subject
from fluxc.runtime import crossover


def conditions(subject: Subject, options: EvalOptions, budgets: Sequence[float], texts: Texts) -> dict[str, Any]:
    """Model, plan, machine, prompts and versions, as plain values."""
    plan, sizes = subject.plan, subject.sizes
    routed: dict[str, Any] = {}
    if plan is not None:
        kinds = sorted({layer.kind for layer in plan.layers})
        routed = {"plan": plan.digest(), "kinds": kinds, "decode": plan.decode, "calibration": plan.calibration}
        routed["dtype"] = plan.model.dtype
    source = subject.model.meta.get("source", "") if isinstance(subject, FluxSubject) else subject.name
    return {
        "model": str(source).rstrip("/").rsplit("/", 1)[-1],
        "device": crossover.device_name(subject.device),
        "sink": sizes.sink,
        "window": sizes.window,
        "context": sizes.context,
        "layers": subject.layers,
        "budgets": list(budgets),
        "options": options.to_dict(),
        "corpus": texts.hash(),
        "versions": versions(),
        **routed,
    }
