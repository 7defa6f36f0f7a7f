"""One step of training after another, each a function of the state before it and its number."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fluxc.calibrate.needs import CHECKPOINT_TOKENS
from fluxc.data import TokenizedPrompt
from fluxc.errors import TrainingError
from fluxc.train.batches import MicroBatch, logistic_noise, micro_batches, step_samples
from fluxc.train.objective import Multipliers, Seen, answer_losses, divergences, penalty
from fluxc.train.optimizer import Optimizer
from fluxc.train.options import TrainOptions
from fluxc.train.processes import Processes
from fluxc.train.program import Trainable


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """One task in one step: prompts, mean answer loss (nats), Ω reached and asked, multipliers after the step."""

    prompts: int
    loss: float
    omega: float
    target: float
    lambda1: float
    lambda2: float


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step did. loss: answers, distillation and penalty; lm: answers alone; padding: share of all tokens."""

    step: int
    loss: float
    lm: float
    omega: float
    tau: float
    lr: float
    grad_norm: float
    padding: float
    tasks: dict[str, TaskRecord]


class Trainer:
    """The routers, their optimizer and multipliers. `bias` f32[L] is the route_bias they are trained under."""

    def __init__(
        self,
        program: Trainable,
        prompts: Sequence[TokenizedPrompt],
        bias: Tensor,
        targets: dict[str, float],
        options: TrainOptions,
        device: str = "cpu",
        processes: Processes | None = None,
    ) -> None:
        self.program, self.options = program, options
        self.multipliers = Multipliers(targets, options.multiplier_start, device)
        self.optimizer = Optimizer(program.routers, self.multipliers, options)
        self.step = 0
        self.is_whole = True
        """False while an update is half done: what is there then is no state to save."""
        self._prompts, self._bias, self._device = prompts, bias.to(device), device
        self._processes = processes or Processes(device)

    def run_step(self) -> StepRecord:
        """Run the next step. Raises TrainingError where the loss is not finite; the state is that before the step."""
        step, options = self.step, self.options
        samples = step_samples(self._prompts, step, options.batch, options.seed)
        parts = micro_batches(self._processes.share(samples), options.micro_tokens, self._device)
        count = self._processes.most(len(parts))
        totals = _Totals(self.multipliers)
        for index in range(count):
            self._accumulate(parts[index] if index < len(parts) else None, step, totals)
        self._processes.add_gradients([*self.program.routers.values(), self.multipliers.values])
        totals.reduce(self._processes)
        norm = nn.utils.clip_grad_norm_(self.program.routers.values(), options.clip)
        self._check(totals.loss, float(norm), step)
        lr = self.optimizer.lr
        self._update()
        return totals.record(step, options.tau(step), lr, float(norm), self.multipliers, len(samples))

    def _accumulate(self, part: MicroBatch | None, step: int, totals: _Totals) -> None:
        """Forward and backward of one micro-batch; None: other processes have one more."""
        if part is None:
            zero = torch.zeros(0, len(self.multipliers.tasks), device=self._device)
            penalty(zero.new_zeros(1, 0), zero, self.multipliers, totals.seen, 1, self._processes.total)
            return
        batch = self.options.batch
        tasks = self.multipliers.index([sample.prompt.task for sample in part.samples])
        logits, weights = self._forward(part, step)
        lm = answer_losses(logits, part.targets)
        learnt = self._with_dense(part, logits, lm)
        price = penalty(weights, tasks, self.multipliers, totals.seen, batch, self._processes.total)
        loss = learnt.sum() / batch + price
        loss.backward()
        totals.add(part, loss, lm, tasks)

    def _forward(self, part: MicroBatch, step: int) -> tuple[Tensor, Tensor]:
        layers = len(self.program.layers)
        noise = logistic_noise(part.samples, layers, step, self.options.seed).to(self._device)
        tau = torch.tensor(self.options.tau(step), device=self._device)
        bias = self._bias[:, None].expand(layers, part.inputs.size).contiguous()
        logits, weights, _ = self._run(part, bias, noise, tau)
        return logits, weights

    def _run(self, part: MicroBatch, bias: Tensor, noise: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module = self.program.module
        module.checkpointing = part.inputs.input_ids.shape[1] > CHECKPOINT_TOKENS
        *first, at = part.inputs.routed(bias)
        found: tuple[Tensor, Tensor, Tensor] = module(*first, noise, tau, at)
        return found

    def _with_dense(self, part: MicroBatch, logits: Tensor, lm: Tensor) -> Tensor:
        """The loss of each prompt with its share of distillation."""
        share = self.options.distill
        if not share:
            return lm
        full = torch.full((len(self.program.layers), part.inputs.size), math.inf, device=self._device)
        with torch.no_grad():
            dense = self._run(part, full, torch.zeros_like(full), torch.ones((), device=self._device))[0]
        return (1 - share) * lm + share * divergences(logits, dense, part.targets)

    def _check(self, loss: float, norm: float, step: int) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        self.optimizer.adamw.zero_grad(set_to_none=True)
        raise TrainingError(
            f"the loss is {loss:g} and its gradient {norm:g} in step {step + 1}",
            hint="lower the learning rate, or train the model in another --dtype",
        )

    def _update(self) -> None:
        self.is_whole = False
        self.optimizer.step()
        self.multipliers.clamp()
        self.step += 1
        self.is_whole = True


class _Totals:
    """What the micro-batches of a step add up to."""

    def __init__(self, multipliers: Multipliers) -> None:
        self.seen = Seen.none(multipliers)
        self.loss = 0.0
        self._lm = torch.zeros_like(multipliers.targets)
        self._tokens = torch.zeros(2, device=multipliers.targets.device)  # valid, padded

    def add(self, part: MicroBatch, loss: Tensor, lm: Tensor, tasks: Tensor) -> None:
        """Count one micro-batch of this process in."""
        self.loss += float(loss.detach())
        self._lm += lm.detach() @ tasks
        self._tokens += torch.tensor([part.valid, part.padded], device=self._tokens.device)

    def reduce(self, processes: Processes) -> None:
        """Sum over all processes; `seen` is summed already."""
        self.loss = float(processes.total(torch.tensor(self.loss, device=self._lm.device)))
        self._lm, self._tokens = processes.total(self._lm), processes.total(self._tokens)

    def record(self, step: int, tau: float, lr: float, norm: float, multipliers: Multipliers, batch: int) -> StepRecord:
        """Plain numbers of the step."""
        valid, padded = self._tokens.tolist()
        omega = float(self.seen.sums.sum() / self.seen.counts.sum())
        lm = float(self._lm.sum()) / batch
        return StepRecord(step, self.loss, lm, omega, tau, lr, norm, 1 - valid / padded, self._tasks(multipliers))

    def _tasks(self, multipliers: Multipliers) -> dict[str, TaskRecord]:
        omega, counts = self.seen.omega().tolist(), self.seen.counts.tolist()
        rows = zip(multipliers.tasks, multipliers.targets.tolist(), multipliers.values.tolist(), strict=True)
        return {
            task: TaskRecord(int(counts[i]), float(self._lm[i]) / counts[i], omega[i], target, *prices)
            for i, (task, target, prices) in enumerate(rows)
            if counts[i]
        }
