"""Token ids of one or several requests as the input tensors of a program (signature.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import DataError

Ids = Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of a captured program, and prompt_lens; route_bias is what a routed one needs besides.

    input_ids, position_ids i64[B,S]; seq_lens, prompt_lens i64[B]; logits_at i64[B,N].
    """

    input_ids: Tensor
    position_ids: Tensor
    seq_lens: Tensor
    prompt_lens: Tensor
    logits_at: Tensor

    @property
    def size(self) -> int:
        """Number of requests."""
        return self.input_ids.shape[0]

    def captured(self) -> tuple[Tensor, ...]:
        """Inputs of the captured program, in order."""
        return self.input_ids, self.position_ids, self.seq_lens, self.logits_at

    def routed(self, route_bias: Tensor) -> tuple[Tensor, ...]:
        """Inputs of the routed program, in order."""
        return self.input_ids, self.position_ids, self.seq_lens, self.prompt_lens, route_bias, self.logits_at


def make_batch(
    input_ids: Ids,
    *,
    prompt_lens: Sequence[int] | Tensor | None = None,
    seq_lens: Sequence[int] | Tensor | None = None,
    logits_at: Any = None,
    context: int,
    device: str = "cpu",
) -> Batch:
    """Pad requests on the right. Defaults: whole rows are valid, all of them prompt, logits of the last valid row.

    Raises DataError for an empty request, one longer than `context` (0: unknown), and contradicting lengths.
    """
    rows = _rows(input_ids)
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    seq = _lengths(seq_lens, [len(row) for row in rows])
    prompt = _lengths(prompt_lens, seq.tolist())
    _check(rows, seq.tolist(), prompt.tolist(), context)
    at = (seq - 1)[:, None] if logits_at is None else torch.as_tensor(logits_at)
    positions = torch.arange(width).expand(len(rows), width).contiguous()
    return Batch(*(tensor.to(device) for tensor in (ids, positions, seq, prompt, at)))


def _rows(input_ids: Ids) -> list[list[int]]:
    values: list[Any] = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    rows = values if values and not isinstance(values[0], int) else [values]
    if not rows or any(len(row) == 0 for row in rows):
        raise DataError("a prompt has no tokens", hint="give at least one")
    return [list(row) for row in rows]


def _lengths(given: Sequence[int] | Tensor | None, default: list[int]) -> Tensor:
    return torch.as_tensor(default if given is None else given, dtype=torch.int64)


def _check(rows: list[list[int]], seq_lens: list[int], prompt_lens: list[int], context: int) -> None:
    if not len(rows) == len(seq_lens) == len(prompt_lens):
        raise DataError(f"{len(rows)} prompts with {len(seq_lens)} seq_lens and {len(prompt_lens)} prompt_lens")
    for row, seq, prompt in zip(rows, seq_lens, prompt_lens, strict=True):
        if 0 < context < seq:
            raise DataError(f"a prompt of {seq} tokens is longer than the model's context of {context}")
        if not 1 <= prompt <= seq <= len(row):
            raise DataError(f"lengths contradict each other: prompt {prompt}, valid {seq}, given {len(row)} tokens")
