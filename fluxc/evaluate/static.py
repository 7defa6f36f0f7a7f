"""The best static choice of layers at any count, by rules of METHOD section 4, on calibration prompts alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fluxc.bench.static import COMPARED, LEFT_OUT, calibration_prompts
from fluxc.bench.systems import first_order_ranking, leave_one_out_ranking, top_layers
from fluxc.data import TokenizedPrompt
from fluxc.evaluate.scorer import Scorer
from fluxc.evaluate.store import Store
from fluxc.progress import SILENT, Progress
from fluxc.runtime.model import FluxModel


class BestStatic:
    """The better of the layers of largest mean need and of leave-one-out, by mean loss on calibration prompts.

    Raises DataError, when first asked, where the folder holds no measurements. `chosen` collects which ranking won.
    """

    def __init__(self, model: FluxModel, scorer: Scorer, store: Store, progress: Progress = SILENT) -> None:
        self._model, self._scorer, self._store, self._progress = model, scorer, store, progress
        self.chosen: dict[int, str] = {}

    def __call__(self, count: int) -> Tensor:
        """The bias [L] with `count` layers full."""
        biases = {name: top_layers(ranks, count) for name, ranks in self.rankings.items()}
        # Scores come from the store the second time: asking again costs nothing.
        self._progress.start(f"best static choice of {count} layers", len(biases) * len(self._prompts))
        losses = {name: self._loss(bias) for name, bias in biases.items()}
        self.chosen[count] = min(losses, key=losses.__getitem__)
        return biases[self.chosen[count]]

    @functools.cached_property
    def rankings(self) -> dict[str, Tensor]:
        """Both rankings of the layers, fp32 [L] each."""
        return {"first-order": first_order_ranking(self._model.flux), "leave-one-out": self._left_out()}

    @functools.cached_property
    def _prompts(self) -> list[TokenizedPrompt]:
        return calibration_prompts(self._model)[:COMPARED]

    def _left_out(self) -> Tensor:
        prompts, layers = self._prompts[:LEFT_OUT], len(self._model.plan.layers)
        key = self._store.key("leave-one-out", [prompt.input_ids for prompt in prompts])
        if self._store.get(key) is None:
            self._progress.start("ranking layers by leaving each out", len(prompts) * layers)
            program, device = self._model.routed_program, self._model.device
            found = leave_one_out_ranking(program, prompts, layers, device, lambda: self._progress.advance())
            self._store.put(key, found.tolist())
        return torch.tensor(self._store.get(key))

    def _loss(self, bias: Tensor) -> float:
        losses = []
        for prompt in self._prompts:
            losses.append(self._scorer.scores(prompt, [bias], lambda: self._progress.advance())[0]["loss"])
        return sum(losses) / len(losses)
