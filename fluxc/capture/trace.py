"""Tracing a transformers causal LM into one program with the captured signature."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fluxc.capture.adapter import TRACE, tracing
from fluxc.capture.rope import choose_longrope_by_position
from fluxc.errors import CaptureError, FluxcError

# Sizes of the example inputs: different from each other and from 0 and 1, which the exporter treats apart.
_B, _S, _N = 2, 8, 3
EXPERTS = "grouped_mm"


def trace(twin: Any, context: int) -> ExportedProgram:
    """Export a trace twin: inputs CAPTURED_INPUTS with B, S, N free from 1, output logits [B,N,V], no cache.

    Raises CaptureError with the exporter's reason where the model cannot be exported.
    """
    twin.config._attn_implementation = TRACE
    _use_exportable_experts(twin)
    choose_longrope_by_position(twin)
    twin.forward = _captured_forward(twin)
    try:
        with tracing(context), _quiet_exporter():
            return torch.export.export(twin, _examples(), dynamic_shapes=_dynamic_shapes(), strict=False)
    except FluxcError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(twin).__name__} cannot be exported with a free batch and length: {_first_line(error)}",
            hint="`--debug` shows where in the model",
        ) from error


def _captured_forward(twin: Any) -> Any:
    plain, head = twin.forward, twin.get_output_embeddings()

    def forward(input_ids: Tensor, position_ids: Tensor, seq_lens: Tensor, logits_at: Tensor) -> Tensor:
        taken: list[bool] = []

        def take_rows(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            taken.append(True)
            return (_rows(args[0], logits_at), *args[1:])

        handle = head.register_forward_pre_hook(take_rows)
        try:
            logits = plain(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        finally:
            handle.remove()
        return logits if taken else _rows(logits, logits_at)

    return forward


def _rows(hidden: Tensor, logits_at: Tensor) -> Tensor:
    """Rows `logits_at` [B,N] of hidden [B,S,C]: [B,N,C]."""
    return hidden.gather(1, logits_at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _use_exportable_experts(twin: Any) -> None:
    """The default loop over the experts that were hit depends on the data; the grouped product does not."""
    if getattr(twin.config, "_experts_implementation", None) is not None:
        twin.config._experts_implementation = EXPERTS


def _examples() -> tuple[Tensor, ...]:
    tokens = torch.zeros(_B, _S, dtype=torch.long)
    positions = torch.arange(_S).expand(_B, _S).contiguous()
    return tokens, positions, torch.full((_B,), _S), torch.zeros(_B, _N, dtype=torch.long)


def _dynamic_shapes() -> tuple[dict[int, Any], ...]:
    B, S, N = Dim("B", min=1), Dim("S", min=1), Dim("N", min=1)
    return {0: B, 1: S}, {0: B, 1: S}, {0: B}, {0: B, 1: N}


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs its whole graph on failure; our error says what matters."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
