"""The paged cache of programs that compute on torch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fluxc import kernels
from fluxc.engine.decode_graphs import DecodeGraphs
from fluxc.engine.programs import LayerKV, Prefilled, Programs
from fluxc.kernels.schemas import PAGE

Array = np.ndarray


class TorchStore:
    """`Store` of torch programs: one tensor [pages,2,Hk,PAGE,D] on their device."""

    def __init__(self, programs: Programs, pages: int) -> None:
        kernels.register()
        self._programs, self._device = programs, programs.device
        shape = programs.layers[0]
        sizes = (pages, 2, shape.kv_heads, PAGE, shape.head_dim)
        self.cache = torch.empty(sizes, dtype=programs.dtype, device=programs.device)
        self._table: tuple[Array, Tensor] | None = None
        self._graphs = DecodeGraphs(programs, self.cache) if programs.device.type == "cuda" else None

    def prefill(self, tokens: Sequence[int], prompt: int, bias: Array, dense: bool) -> Iterator[LayerKV | Prefilled]:
        """See `Store.prefill`."""
        ids = torch.tensor([list(tokens)], device=self._device)
        end, last = (torch.tensor([at], device=self._device) for at in (prompt, len(tokens) - 1))
        with torch.no_grad():
            items = iter(self._programs.prefill(ids, end, self._tensor(bias), last[:, None], dense=dense))
        while True:
            # Not around the loop: between two items another caller's grad mode would be changed.
            with torch.no_grad():
                item = next(items, None)
            if item is None:
                return
            yield _on_host(item) if isinstance(item, Prefilled) else item
            del item

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor, slots: Array) -> None:
        """See `Store.write`; a ring keeps few of a long prompt, so only those are handed on."""
        kept = np.flatnonzero(slots[0] >= 0)
        if len(kept) < slots.shape[1]:
            at = self._tensor(kept)
            k, v, slots = k.index_select(2, at), v.index_select(2, at), slots[:, kept]
        torch.ops.fluxc.kv_write(self.cache, k, v, self._tensor(slots))

    @torch.no_grad()
    def decode(self, ids: Array, positions: Array, slots: Array, table: Array, lens: Array) -> Tensor:
        """See `Store.decode`; on a GPU as CUDA graphs."""
        if self._graphs is not None:
            return self._graphs(ids, positions, slots, table, lens)
        if self._table is None or self._table[0] is not table:
            self._table = table, self._tensor(table)
        ids_, positions_, slots_, lens_ = (self._tensor(x) for x in (ids, positions, slots, lens))
        return self._programs.decode(self.cache, ids_, positions_, slots_, self._table[1], lens_)

    @torch.no_grad()
    def append(self, *inputs: Array) -> Tensor:
        """See `Store.append`."""
        return self._programs.append(self.cache, *map(self._tensor, inputs))

    def _tensor(self, array: Array) -> Tensor:
        values = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type != "cuda":
            return values.to(self._device)
        # From pageable memory the host would wait until the device has done all it was given.
        return values.pin_memory().to(self._device, non_blocking=True)


def _on_host(item: Prefilled) -> Prefilled:
    return Prefilled(item.logits, item.routes.cpu(), None if item.scores is None else item.scores.cpu())
