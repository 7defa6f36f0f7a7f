"""Decode steps replayed as CUDA graphs: one copy to the device and one launch, whatever the routes.

A decode step of a small batch is bound by its launches: thousands for a model of 36 layers, each a few microseconds of
the host. Its programs read slots, lengths and page tables on the device, so that one recorded graph serves full and
sparse layers, growing lengths and changing requests. Graphs are recorded when a size first appears: batches are filled
up to a power of two with rows that write and read nothing, page tables to a power of two of pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxc.engine.programs import Programs

Array = np.ndarray

LEAST_PAGES = 16
"""Narrowest page table: shorter requests share its graph."""


class DecodeGraphs:
    """The decode program over one cache. Not to be used by two threads at a time.

    `record=False` runs every step eagerly on the same filled-up inputs, on any device.
    """

    def __init__(self, programs: Programs, cache: Tensor, *, record: bool = True) -> None:
        self._programs, self._cache, self._record = programs, cache, record
        self._steps: dict[tuple[int, int], _Step] = {}
        self._memory = torch.cuda.graph_pool_handle() if record else None
        self._seen: tuple[Array, _Step] | None = None

    def __len__(self) -> int:
        """Sizes seen so far, each of them recorded."""
        return len(self._steps)

    def __call__(self, ids: Array, positions: Array, slots: Array, table: Array, lens: Array) -> Tensor:
        """Logits [B,V] of one step: inputs as in `Store.decode`, an unchanged `table` the same object as before."""
        step = self._step(table)
        if self._seen is None or self._seen[0] is not table or self._seen[1] is not step:
            step.take_table(table)
            self._seen = table, step
        step.take(ids, positions, slots, lens)
        return step.run()[: len(ids)].clone()

    def _step(self, table: Array) -> _Step:
        layers, batch, pages = table.shape
        size = power_of_two(batch), power_of_two(max(pages, LEAST_PAGES))
        if size not in self._steps:
            step = _Step(self._programs, self._cache, Sizes(layers, *size))
            if self._record:
                step.record(self._memory)
            self._steps[size] = step
        return self._steps[size]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Attention layers A, batch B and pages P of a step."""

    layers: int
    batch: int
    pages: int

    @property
    def numbers(self) -> Sequence[int]:
        """How many of the numbers that change with every step are ids, positions, slots and lengths."""
        return self.batch, self.batch, self.layers * self.batch, self.layers * self.batch


class _Step:
    """One size of the decode program: its inputs at fixed addresses, and the graph that reads them."""

    def __init__(self, programs: Programs, cache: Tensor, sizes: Sizes) -> None:
        self._programs, self._cache, self._sizes = programs, cache, sizes
        device, count = programs.device, sum(sizes.numbers)
        # Everything that changes with the token is one tensor, and so one copy.
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = torch.zeros(count, dtype=torch.int64, device=device)
        self._table = torch.zeros(sizes.layers, sizes.batch, sizes.pages, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._clear()

    def take_table(self, table: Array) -> None:
        """Page table i32[A,b,p] with b and p up to this step's sizes."""
        wide = np.zeros(self._table.shape, np.int32)
        wide[:, : table.shape[1], : table.shape[2]] = table
        self._table.copy_(torch.from_numpy(wide))

    def take(self, ids: Array, positions: Array, slots: Array, lens: Array) -> None:
        """ids, positions i64[b,1], slots i64[A,b], lens i32[A,b]; further rows write nothing and see nothing."""
        if self._copied:
            self._copied.synchronize()  # the copy before may still read
        count = len(ids)
        self._clear()
        for part, values in zip(self._parts(self._host), (ids.T, positions.T, slots, lens), strict=True):
            part.numpy()[:, :count] = values
        self._send()

    def record(self, memory: Any) -> None:
        """Record the graph. Two runs before it compile and choose kernels, on rows that write and read nothing."""
        self._send()
        stream = torch.cuda.Stream(self._programs.device)
        stream.wait_stream(torch.cuda.current_stream(self._programs.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._eager()
        torch.cuda.current_stream(self._programs.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: a server that reads memory, another engine.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            self._logits = self._eager()
        self._graph = graph

    def run(self) -> Tensor:
        """Logits [B,V]; the next run of any size may write over them."""
        if self._graph is None or self._logits is None:
            return self._eager()
        self._graph.replay()
        return self._logits

    def _eager(self) -> Tensor:
        ids, positions, slots, lens = self._parts(self._numbers)
        return self._programs.decode(self._cache, ids.T, positions.T, slots, self._table, lens.to(torch.int32))

    def _parts(self, numbers: Tensor) -> Sequence[Tensor]:
        """ids, positions [1,B], slots, lens [A,B] as views."""
        return [part.view(-1, self._sizes.batch) for part in numbers.split(list(self._sizes.numbers))]

    def _clear(self) -> None:
        self._host.zero_()
        self._parts(self._host)[2].fill_(-1)

    def _send(self) -> None:
        self._numbers.copy_(self._host, non_blocking=True)
        if self._copied:
            self._copied.record(torch.cuda.current_stream(self._programs.device))


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count` (>= 1)."""
    return 1 << (count - 1).bit_length()
