"""Checkpoints of a training run: safetensors and JSON, one folder a step, the newest kept.

A checkpoint holds all that a step reads besides the options and the data, which it names by digest: a run that was
killed and resumed ends in the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxc.atomic import atomic_directory
from fluxc.errors import TrainingError
from fluxc.train.trainer import Trainer

TENSORS, STATE = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_MULTIPLIERS, _ROUTER, _MOMENT = "multipliers", "router/", "moment/"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run under `folder`. `run` says what they belong to: model, options, data."""

    folder: Path
    run: dict[str, str]

    def save(self, trainer: Trainer) -> None:
        """Write the state after `trainer.step` steps, then drop older ones. Raises StorageError."""
        path = self.folder / f"step-{trainer.step:06d}"
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_directory(path) as root:
            save_file(_tensors(trainer), root / TENSORS)
            (root / STATE).write_text(json.dumps({"step": trainer.step, "run": self.run}, indent=1))
        for old in self._all()[:-1]:
            shutil.rmtree(old)

    def restore(self, trainer: Trainer) -> int:
        """Take up the newest checkpoint; returns its step, 0 where there is none.

        Raises TrainingError for one that is damaged or belongs to another model, other options or other data.
        """
        found = self._all()
        if not found:
            return 0
        state, tensors = _read(found[-1])
        self._check(found[-1], state.get("run"))
        try:
            _put_back(trainer, tensors, state["step"])
        except (KeyError, RuntimeError) as cause:
            raise TrainingError(f"{found[-1]} does not fit this model", hint="--force starts over") from cause
        return trainer.step

    def clear(self) -> None:
        """Drop all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Oldest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in paths if _NAME.fullmatch(path.name))

    def _check(self, path: Path, run: Any) -> None:
        kept = run if isinstance(run, dict) else {}
        other = [name for name, value in self.run.items() if kept.get(name) != value]
        if other:
            raise TrainingError(
                f"the checkpoint {path} belongs to {' and '.join(f'another {name}' for name in other)}",
                hint="--force starts over; or train as before",
            )


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    routers = {_ROUTER + name: tensor for name, tensor in trainer.program.trained().items()}
    moments = {_MOMENT + name: tensor.clone() for name, tensor in trainer.optimizer.state().items()}
    return {**routers, **moments, _MULTIPLIERS: trainer.multipliers.values.detach().cpu().clone()}


def _put_back(trainer: Trainer, tensors: dict[str, Tensor], step: int) -> None:
    for name, parameter in trainer.program.routers.items():
        parameter.data.copy_(tensors[_ROUTER + name])
    trainer.multipliers.values.data.copy_(tensors[_MULTIPLIERS])
    moments = {name.removeprefix(_MOMENT): t for name, t in tensors.items() if name.startswith(_MOMENT)}
    trainer.optimizer.restore(moments, step)
    trainer.step = step


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        state = json.loads((path / STATE).read_text())
        tensors = load_file(path / TENSORS)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise ValueError("it names no step")
    except (OSError, ValueError, SafetensorError) as cause:
        raise TrainingError(f"the checkpoint {path} cannot be read: {cause}", hint="--force starts over") from cause
    return state, tensors
