"""`fluxc.train`: a calibrated model.flux gets routers trained end to end, and a curve fitted to them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxc.artifact import update_flux
from fluxc.calibrate.calibration import achieved
from fluxc.calibrate.verify import Verification, verify
from fluxc.errors import OptionError
from fluxc.flux_dir import FluxDir, open_flux
from fluxc.ir.graph import runnable
from fluxc.plan import Plan
from fluxc.progress import SILENT, Progress
from fluxc.runtime.model import FluxModel
from fluxc.train.batches import micro_batches, step_samples
from fluxc.train.checkpoint import Checkpoints
from fluxc.train.curve import POINTS, refit_curve
from fluxc.train.data import TrainData, training_data
from fluxc.train.log import mean_padding
from fluxc.train.options import TrainOptions
from fluxc.train.processes import joined
from fluxc.train.program import Trainable, trainable
from fluxc.train.report import collapse
from fluxc.train.run import run
from fluxc.train.trainer import StepRecord, Trainer

LOG = "training.csv"
REPORT = "training.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` made: the model.flux it changed, its new plan, and how it went (plain values)."""

    path: Path
    plan: Plan
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """All that a run starts from: model, data, the Ω target of each task, and the route_bias f32[L] it trains under."""

    flux: FluxDir
    data: TrainData
    targets: dict[str, float]
    bias: Tensor
    options: TrainOptions

    def names(self) -> dict[str, str]:
        """Digests of what a checkpoint belongs to."""
        plan = self.flux.plan
        made = {"options": self.options.digest(), "data": self.data.digest()}
        return {"model": plan.model.weights, "plan": plan.digest(), **made}

    def padding(self, steps: int = 20) -> float:
        """Share of padding among the tokens of the first steps."""
        options, prompts = self.options, self.data.train
        samples = [step_samples(prompts, step, options.batch, options.seed) for step in range(steps)]
        parts = [part for step in samples for part in micro_batches(step, options.micro_tokens)]
        return 1 - sum(part.valid for part in parts) / sum(part.padded for part in parts)


def train(
    path: str | Path,
    *,
    data: str | Path | None = None,
    options: TrainOptions | None = None,
    tokenizer: Any = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = SILENT,
) -> Trained:
    """Train the routers of a model.flux directory in place: its routers, plan and measurements change, nothing else.

    `data`: a JSONL file or a folder of Hugging Face `datasets`, None for generated prompts. A run that was interrupted
    goes on from its last checkpoint, kept beside the directory, unless `force` is set. The plan's budget stays; its
    curve is fitted to the new scores, so that every budget can still be asked for.

    Under torchrun or accelerate launch the processes share each step's prompts, and the first of them writes.

    Raises ArchiveError for a directory that is damaged, DataError for data that cannot be used or a task without a
    target, OptionError for a budget of 0 or 1 with calibrated routers, TrainingError where the loss is not finite or a
    checkpoint belongs to another run. Nothing is changed then.
    """
    started = time.perf_counter()
    with joined(device) as processes:
        device = processes.device
        ready = prepare(path, data=data, options=options, tokenizer=tokenizer, progress=progress)
        flux, prompts, options = ready.flux, ready.data, ready.options
        program = trainable(flux, options, device)
        trainer = Trainer(program, prompts.train, ready.bias, ready.targets, options, device, processes)
        work = work_folder(flux.path)
        if force and processes.is_first:
            shutil.rmtree(work, ignore_errors=True)
        processes.wait()
        last = run(trainer, Checkpoints(work / CHECKPOINTS, ready.names()), work / LOG, processes, progress)
        if processes.is_first:
            plan, verified = _finish(flux.plan, program, prompts, device, progress)
            report = _report(options, prompts, last, verified, trainer)
            report |= {"padding": mean_padding(work / LOG), "seconds": round(time.perf_counter() - started, 1)}
            _write(flux, dataclasses.replace(plan, calibration=_calibration(plan, options, prompts)), program, report)
            for warning in report["warnings"]:
                progress.note(warning)
        processes.wait()
        return _written(flux.path)


def _write(flux: FluxDir, plan: Plan, program: Trainable, report: dict[str, Any]) -> None:
    work = work_folder(flux.path)
    files = {REPORT: json.dumps(report, indent=1), LOG: (work / LOG).read_text()}
    update_flux(flux.path, plan, program.trained(), files)
    shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
    (work / LOG).unlink()
    if not any(work.iterdir()):  # TensorBoard's files stay
        work.rmdir()


def _written(path: Path) -> Trained:
    """What every process returns: the model as it is now on the disk."""
    flux = open_flux(path, verify_weights=False)
    return Trained(path, flux.plan, json.loads((path / "measurements" / REPORT).read_text()))


def prepare(
    path: str | Path,
    *,
    data: str | Path | None = None,
    options: TrainOptions | None = None,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> Prepared:
    """Open the model and read the data, and refuse what cannot be trained; see `train`."""
    options = options or TrainOptions()
    flux = open_flux(path)
    bias = training_bias(flux.plan, options)
    progress.start("reading data")
    prompts = training_data(options, data, tokenizer or FluxModel(flux).tokenizer, flux.plan, progress)
    return Prepared(flux, prompts, targets_of(prompts, options, flux.plan.budget), bias, options)


def work_folder(path: Path) -> Path:
    """Where a run keeps its log and checkpoints until it is done."""
    return path.with_name(path.name + ".training")


def training_bias(plan: Plan, options: TrainOptions) -> Tensor:
    """The route_bias f32[L] under which routers are trained: the plan's, or none for fresh ones; pins hold."""
    pins = [{"full": math.inf, "sparse": -math.inf}.get(layer.pin or "", 0.0) for layer in plan.layers]
    if options.start == "fresh":
        return torch.tensor(pins)
    bias = torch.tensor(plan.bias())
    if not bool(bias.isfinite().any()):
        raise OptionError(
            f"at budget {plan.budget:g} no route is left to a router", hint="fluxc calibrate MODEL.flux --budget 0.4"
        )
    return bias


def targets_of(prompts: TrainData, options: TrainOptions, budget: float) -> dict[str, float]:
    """The Ω target of each task in the data, in alphabetical order. Raises DataError for a task without one."""
    return {task: options.target_of(task, budget) for task in sorted({p.task for p in prompts.train})}


def _finish(
    plan: Plan, program: Trainable, prompts: TrainData, device: str, progress: Progress
) -> tuple[Plan, Verification]:
    """The plan with a curve for the trained routers, and what held-out prompts show."""
    module = runnable(program.with_trained())
    progress.start("finding thresholds", len(POINTS) * len(prompts.curve))
    curve = refit_curve(module, len(program.layers), prompts.curve, device, progress.advance)
    plan = dataclasses.replace(plan, curve=curve, achieved={})
    progress.start("verifying on held-out prompts", 2 * len(prompts.heldout))
    verified = verify(module, prompts.heldout, torch.tensor(plan.bias()).to(device), progress.advance)
    return dataclasses.replace(plan, achieved={f"{plan.budget:g}": achieved(verified)}), verified


def _report(
    options: TrainOptions, prompts: TrainData, last: StepRecord | None, verified: Verification, trainer: Trainer
) -> dict[str, Any]:
    return {
        "options": options.to_dict(),
        "data": _origin(options, prompts),
        "last": dataclasses.asdict(last) if last else None,
        "multipliers": dict(zip(trainer.multipliers.tasks, trainer.multipliers.values.tolist(), strict=True)),
        "verified": verified.to_dict(),
        "warnings": collapse(verified),
    }


def _calibration(plan: Plan, options: TrainOptions, prompts: TrainData) -> dict[str, Any]:
    return {**plan.calibration, "training": _origin(options, prompts)}


def _origin(options: TrainOptions, prompts: TrainData) -> dict[str, Any]:
    counts = {"train": len(prompts.train), "curve": len(prompts.curve), "heldout": len(prompts.heldout)}
    return {"steps": options.steps, "seed": options.seed, "options": options.digest(), "origin": prompts.origin} | {
        "prompts": counts,
        "digest": prompts.digest(),
    }
