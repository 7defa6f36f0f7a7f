"""Routes chosen with the answer at hand: how much better than the routers anything that chooses layers could be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fluxc.bench.systems import top_layers
from fluxc.calibrate.leave_one_out import leave_one_out
from fluxc.calibrate.needs import measure_needs
from fluxc.calibrate.runner import forced
from fluxc.data import TokenizedPrompt
from fluxc.evaluate.store import Store


class Oracle:
    """`ranking`: the layers of largest first-order need on this very prompt. `greedy`: layers go sparse one at a time,
    each time the one whose loss on the answer rises least; about L * L / 2 partial passes a prompt."""

    def __init__(self, program: ExportedProgram, kind: str, store: Store, device: str) -> None:
        self._program, self._kind, self._store, self._device = program, kind, store, device

    def bias(self, prompt: TokenizedPrompt, layers: int, count: int) -> Tensor:
        """The bias [L] with `count` of `layers` full."""
        order = self._order(prompt, layers)
        return top_layers(torch.tensor(order, dtype=torch.float32), count)

    def _order(self, prompt: TokenizedPrompt, layers: int) -> list[float]:
        """How long each layer stays full: larger values go sparse later."""
        key = self._store.key("oracle", self._kind, prompt.input_ids, prompt.prompt_len)
        found: Any = self._store.get(key)
        if found is None:
            found = self._ranking(prompt) if self._kind == "ranking" else self._greedy(prompt, layers)
            self._store.put(key, found)
        return list(found)

    def _ranking(self, prompt: TokenizedPrompt) -> list[float]:
        measured = measure_needs(self._program, [prompt], (0.0, 0.5), device=self._device)
        return measured[0].need.tolist()

    def _greedy(self, prompt: TokenizedPrompt, layers: int) -> list[float]:
        left, order = [True] * layers, [0.0] * layers
        for turn in range(layers - 1):
            rises = leave_one_out(self._program, prompt, left, device=self._device)
            rises[~torch.tensor(left)] = torch.inf
            gone = int(rises.argmin())
            left[gone], order[gone] = False, float(turn)
        order[left.index(True)] = float(layers)
        return order


def all_full(layers: int) -> Tensor:
    """The dense bias [L]."""
    return forced([True] * layers)
