"""Proof that the masks of a model are what `fluxc::attention` computes: causal, or causal within the layer's window.

transformers gives an attention function no mask when it knows none for it, and some models say things in the mask
alone (chunks, prefixes). So the model runs once on two tokens under a probe that collects each layer's mask function,
and those functions are evaluated where wrong ones would differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.capture.adapter import PROBE, ProbedLayer, probing
from fluxc.errors import UnsupportedAttentionError


def probe_layers(model: Any, context: int) -> list[ProbedLayer]:
    """Every attention of `model` (a twin under no particular attention), in call order, its mask proven.

    Raises UnsupportedAttentionError, naming the layer, where a mask is not causal with that layer's window.
    """
    model.config._attn_implementation = PROBE
    device = next(model.parameters()).device
    with probing(context) as layers, torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    for layer in layers:
        _prove(layer, context, device)
    return layers


def _prove(layer: ProbedLayer, context: int, device: torch.device) -> None:
    number, window = layer.call.layer, layer.call.window
    if layer.mask is None:
        raise UnsupportedAttentionError(f"the attention of layer {number} has no mask: it is not known to be causal")
    rows, columns = _pairs(window, context, device)
    zeros = torch.zeros_like(rows)
    allowed = layer.mask(zeros, zeros, rows, columns)
    expected = columns <= rows
    if window:
        expected = expected & (rows - columns < window)
    wrong = (allowed != expected).nonzero().flatten()
    if len(wrong):
        raise UnsupportedAttentionError(_difference(number, window, rows[wrong[0]], columns[wrong[0]]))


def _difference(number: int, window: int, row: Tensor, column: Tensor) -> str:
    kind = f"causal within a window of {window}" if window else "causal"
    return (
        f"the mask of layer {number} is not {kind}: it differs for query {int(row)} and key {int(column)} "
        "(a chunked, prefix or bidirectional mask)"
    )


def _pairs(window: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and key positions: every pair of the first 64, then the edges of each power of two, window and context."""
    last = max(context, 64) - 1
    edges = {0, 1, 2, 63, window, 2 * window, last, *(2**e for e in range(6, 24))}
    far = sorted({e + d for e in edges for d in (-1, 0, 1) if 0 <= e + d <= last} | set(range(64)))
    offsets = sorted({0, 1, 2, -1, window - 1, window, window + 1, *(2**e for e in range(2, 24))})
    near = [(row, row - offset) for row in far for offset in offsets if 0 <= row - offset <= last]
    pairs = near + [(row, column) for row in far for column in far]
    rows, columns = torch.tensor(pairs, device=device).unbind(1)
    return rows, columns
