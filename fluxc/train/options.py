"""Options of router training, and the two presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fluxc.data import USER_TASK, group_of
from fluxc.errors import DataError, OptionError
from fluxc.options import Options

STARTS = ("calibrated", "fresh")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class TrainOptions(Options):
    """How routers are trained (METHOD section 1). Ω targets and shares lie in 0..1, lengths are tokens."""

    steps: int = 200
    batch: int = 16
    """Prompts a step, over all processes."""
    micro_tokens: int = 16384
    """Padded tokens that run at once; a step accumulates gradients over as many micro-batches as it needs."""
    prompts: int = 384
    """Prompts to generate where no data are given; they are gone through again in another order."""
    length: int | None = None
    """Tokens of generated prompts, at most the context; None: one, one and a half and two times the shortest valid."""
    targets: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"retrieval": 0.75, "text": 0.75, "local": 0.95}
    )
    """Ω to reach, by task or by group of tasks; unlabelled data take 1 - budget."""
    start: str = "calibrated"
    """calibrated: the routers of the model.flux, under its budget's biases | fresh: untrained ones biased to full."""
    router_lr: float = 5e-4
    multiplier_lr: float = 1e-2
    multiplier_start: float = 1.0
    """First value of both multipliers of every task."""
    weight_decay: float = 0.1
    warmup: float = 0.1
    """Share of the steps in which the learning rates rise; they fall along a cosine after that."""
    clip: float = 1.0
    """Largest norm of the routers' gradient."""
    tau_start: float = 1.0
    tau_end: float = 0.3
    straight_through: bool = False
    """Hard routes with soft gradients, as in the paper's code, instead of the paper's mix."""
    distill: float = 0.0
    """Share of the loss that is the divergence from dense logits on the answer, 0..1."""
    dtype: str | None = None
    """float32 | bfloat16 | float16 for the frozen model; None keeps its own. Routers are fp32 always."""
    seed: int = 0
    save_every: int = 25
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", dict(self.targets))
        for name in ("steps", "batch", "micro_tokens", "prompts", "save_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        for name in ("router_lr", "tau_start", "tau_end", "clip"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "it must be positive")
        for name in ("multiplier_lr", "multiplier_start", "weight_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "it must not be negative")
        for name in ("warmup", "distill"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "it lies between 0 and 1")
        for task, target in self.targets.items():
            _require(0 <= target <= 1, f"target of {task}", target, "Ω lies between 0 and 1")
        _require(self.start in STARTS, "start", self.start, f"choose one of {', '.join(STARTS)}")
        _require(self.dtype in (None, *DTYPES), "dtype", self.dtype, f"choose one of {', '.join(DTYPES)}")

    def target_of(self, task: str, budget: float) -> float:
        """The Ω a task is drawn to: its own target, else its group's. Raises DataError for a task without one."""
        known = {USER_TASK: 1 - budget} | dict(self.targets)
        name = task if task in known else group_of(task)
        if name not in known or (name == USER_TASK and task != USER_TASK and USER_TASK not in self.targets):
            raise DataError(f"the task {task!r} of the data has no target", hint=f"give one: --target {task}=0.6")
        return known[name]

    def tau(self, step: int) -> float:
        """Temperature of a step, falling geometrically from tau_start to tau_end."""
        done = step / max(self.steps - 1, 1)
        return self.tau_start * (self.tau_end / self.tau_start) ** done


PRESETS: dict[str, dict[str, object]] = {
    "fast": {},
    # METHOD section 1. It gives neither temperatures nor first multipliers: those are ours.
    "paper": {
        "steps": 300,
        "batch": 48,
        "micro_tokens": 65536,
        "prompts": 1440,
        "length": 65536,
        "targets": {"retrieval": 0.45, "text": 1.0, "local": 1.0},
        "start": "fresh",
        "multiplier_lr": 1e-3,
        "multiplier_start": 0.0,
        "warmup": 0.2,
        "tau_start": 5.0,
        "tau_end": 0.5,
    },
}
"""What each preset changes from the defaults."""


def preset(name: str, **changes: object) -> TrainOptions:
    """A preset with changes; raises OptionError for an unknown preset, option or value."""
    if name not in PRESETS:
        raise OptionError(f"unknown preset {name!r}", hint=f"choose one of {', '.join(PRESETS)}")
    return TrainOptions.from_dict(PRESETS[name] | changes)


def _require(holds: bool, name: str, value: object, hint: str) -> None:
    if not holds:
        raise OptionError(f"{name} is {value}", hint=hint)
