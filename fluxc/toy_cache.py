"""A KV cache kept by the plainest rules, for tests of the programs that read and write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fluxc.engine.programs import LayerKV, Prefilled, Programs
from fluxc.kernels.schemas import PAGE


@dataclasses.dataclass
class ToyRequest:
    """One request: its tokens so far and, for each attention layer, its pages and (sink, window), None where full."""

    tokens: list[int]
    rings: list[tuple[int, int] | None]
    pages: list[list[int]]

    def slot(self, layer: int, position: int) -> int:
        """Where the token at `position` stands."""
        ring, at = self.rings[layer], position
        if ring and position >= ring[0]:
            at = ring[0] + (position - ring[0]) % ring[1]
        return self.pages[layer][at // PAGE] * PAGE + at % PAGE

    def slots(self, layer: int, start: int, end: int) -> list[int]:
        """Slots of the tokens start..end, -1 for those that are gone once token end - 1 is there."""
        ring = self.rings[layer]
        kept = [ring is None or p < ring[0] or p >= end - ring[1] for p in range(start, end)]
        return [self.slot(layer, p) if keep else -1 for p, keep in zip(range(start, end), kept, strict=True)]

    def valid(self, layer: int, length: int) -> int:
        """Slots in use after `length` tokens."""
        ring = self.rings[layer]
        return length if ring is None else min(length, sum(ring))


class ToyCache:
    """Requests of one `Programs`, each with room for `room` tokens; sparse layers keep (sink, window).

    Pages are handed out in a shuffled order, and unused ones hold NaN: nothing may read them.
    """

    def __init__(self, programs: Programs, sink: int, window: int, room: int, requests: int) -> None:
        self.programs, self.sink, self.window = programs, sink, window
        self.requests: list[ToyRequest] = []
        self._per_layer = -(-room // PAGE)
        first, count = programs.layers[0], len(programs.layers) * requests * self._per_layer
        shape = (count, 2, first.kv_heads, PAGE, first.head_dim)
        self.cache = torch.full(shape, torch.nan, dtype=programs.dtype)
        self._free = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()

    def prefill(self, ids: Sequence[int], route_bias: Tensor, *, dense: bool = False) -> Prefilled:
        """Add a request by prefilling it; routes come from f32[L] `route_bias`. Returns the end of the prefill."""
        request = ToyRequest(list(ids), [], [])
        at = torch.tensor([[len(ids) - 1]])
        args = torch.tensor([list(ids)]), torch.tensor([len(ids)]), route_bias[:, None], at
        end = None
        for item in self.programs.prefill(*args, dense=dense):
            if isinstance(item, LayerKV):
                self._store(request, item)
            else:
                end = item
        self.requests.append(request)
        assert end is not None, "a prefill ends with its result"
        return end

    def _store(self, request: ToyRequest, item: LayerKV) -> None:
        shape = self.programs.layers[item.index]
        own = (0, shape.window) if shape.window else None
        request.rings.append((self.sink, self.window) if item.route is False else own)
        request.pages.append([self._free.pop() for _ in range(self._per_layer)])
        slots = torch.tensor([request.slots(item.index, 0, len(request.tokens))])
        torch.ops.fluxc.kv_write(self.cache, item.k, item.v, slots)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each request: logits [B,V]."""
        lengths = [len(request.tokens) for request in self.requests]
        slots = [[r.slot(a, n) for r, n in zip(self.requests, lengths, strict=True)] for a in self._layers]
        logits = self.programs.decode(
            self.cache,
            torch.tensor(tokens)[:, None],
            torch.tensor(lengths)[:, None],
            torch.tensor(slots),
            self._page_table(),
            self._lens([n + 1 for n in lengths]),
        )
        for request, token in zip(self.requests, tokens, strict=True):
            request.tokens.append(token)
        return logits

    def append(self, turns: Sequence[Sequence[int]], logits_at: Tensor) -> Tensor:
        """Append a turn of some tokens to each request: logits [B,N,V] of the rows `logits_at` of the turns."""
        starts = [len(request.tokens) for request in self.requests]
        width = max(map(len, turns))
        rings = torch.tensor([[r.rings[a] or (0, 0) for r in self.requests] for a in self._layers])
        logits = self.programs.append(
            self.cache,
            torch.tensor([[*turn, *[0] * (width - len(turn))] for turn in turns]),
            torch.tensor(starts)[:, None] + torch.arange(width),
            torch.tensor([len(turn) for turn in turns]),
            torch.tensor([[self._turn_slots(a, b, turns[b], width) for b in range(len(turns))] for a in self._layers]),
            self._page_table(),
            self._lens(starts),
            torch.tensor(starts),
            rings[..., 0],
            rings[..., 1],
            logits_at,
        )
        for request, turn in zip(self.requests, turns, strict=True):
            request.tokens.extend(turn)
        return logits

    @property
    def _layers(self) -> range:
        return range(len(self.programs.layers))

    def _turn_slots(self, layer: int, row: int, turn: Sequence[int], width: int) -> list[int]:
        start = len(self.requests[row].tokens)
        return [*self.requests[row].slots(layer, start, start + len(turn)), *[-1] * (width - len(turn))]

    def _page_table(self) -> Tensor:
        return torch.tensor([[r.pages[a] for r in self.requests] for a in self._layers], dtype=torch.int32)

    def _lens(self, lengths: Sequence[int]) -> Tensor:
        pairs: list[Any] = list(zip(self.requests, lengths, strict=True))
        return torch.tensor([[r.valid(a, n) for r, n in pairs] for a in self._layers], dtype=torch.int32)
