"""A torch-trt engine directory for torch tensors: pieces of the prefill one after another, and the decode step."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxc import kernels

PIECES, DECODE = "pieces.json", "decode.pt2"


class TorchTrtPhases:
    """`parity.Phases` over the files in `root`: torch's own archives, so open none that others may have changed."""

    def __init__(self, root: Path) -> None:
        kernels.register()
        self._root = root
        self._plan: dict[str, Any] = json.loads((root / PIECES).read_text(encoding="utf-8"))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, route_bias: Tensor, logits_at: Tensor) -> dict[str, Tensor]:
        """See `parity.Phases.prefill`."""
        lens = torch.tensor([input_ids.shape[1]])
        given = {
            "input_ids": input_ids,
            "position_ids": torch.arange(input_ids.shape[1])[None],
            "seq_lens": lens,
            "prompt_lens": lens,
            "route_bias": route_bias,
            "logits_at": logits_at,
        }
        values = {name: value.to(self._device) for name, value in given.items()}
        for piece, module in zip(self._plan["pieces"], self._modules, strict=True):
            left = module(*(values[name] for name in piece["enters"]))
            values |= dict(zip(piece["leaves"], left, strict=True))
        return dict(zip(self._names, (values[name].cpu() for name in self._plan["outputs"]), strict=True))

    @torch.no_grad()
    def decode(
        self, caches: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor, slots: Tensor, lens: Tensor
    ) -> Tensor:
        """See `parity.Phases.decode`."""
        step = (input_ids, position_ids, slots, lens, *caches.values())
        logits, *written = self._decode(*(value.to(self._device) for value in step))
        for cache, value in zip(caches.values(), written, strict=True):
            cache.copy_(value)
        return logits.cpu()

    def close(self, phase: str) -> None:
        """See `parity.Phases.close`."""
        self.__dict__.pop("_modules" if phase == "prefill" else "_decode", None)

    @property
    def _names(self) -> list[str]:
        """The program's outputs in order: logits, routes, scores, and k and v of each attention."""
        layers = (len(self._plan["outputs"]) - 3) // 2
        return ["logits", "routes", "scores", *(f"{name}_{index}" for index in range(layers) for name in "kv")]

    @functools.cached_property
    def _modules(self) -> list[Any]:
        return [torch.export.load(self._root / piece["file"]).module() for piece in self._plan["pieces"]]

    @functools.cached_property
    def _decode(self) -> Any:
        return torch.export.load(self._root / DECODE).module()

    @functools.cached_property
    def _device(self) -> torch.device:
        weights = [value for module in self._modules for value in module.state_dict().values()]
        return weights[0].device
