"""An ONNX engine for torch tensors: what parity checks and the engine's programs call."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fluxc.exporters.onnx_sessions import OnnxSessions


@dataclasses.dataclass(frozen=True)
class OnnxPhases:
    """`parity.Phases` over the sessions; tensors on the CPU and arrays share their memory."""

    sessions: OnnxSessions

    def prefill(
        self, input_ids: Tensor, route_bias: Tensor, logits_at: Tensor, prompt_lens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """See `parity.Phases.prefill`; `prompt_lens` i64[1] is the whole length where it is not given."""
        lens = torch.tensor([input_ids.shape[1]]) if prompt_lens is None else prompt_lens
        found = self.sessions.prefill(*(tensor.numpy() for tensor in (input_ids, lens, route_bias, logits_at)))
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def decode(
        self, caches: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor, slots: Tensor, lens: Tensor
    ) -> Tensor:
        """See `parity.Phases.decode`."""
        arrays = {name: cache.numpy() for name, cache in caches.items()}
        step = (tensor.numpy() for tensor in (input_ids, position_ids, slots, lens))
        return torch.from_numpy(self.sessions.decode(arrays, *step))

    def close(self, phase: str) -> None:
        """See `parity.Phases.close`."""
        self.sessions.close(phase)
