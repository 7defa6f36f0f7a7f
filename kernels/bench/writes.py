"""Writing keys and values to a paged cache, inside a CUDA graph, against torch's indexed write; ideal: a plain copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fluxc import kernels
from fluxc.kernels.bench.cases import Shape
from fluxc.kernels.bench.measure import clocks, copy_tbps, graphed, interleaved
from fluxc.kernels.schemas import PAGE

DTYPE = torch.bfloat16
REPEATS = 10
SIZES = ((1, 1), (8, 1), (1, 512), (1, 8192), (1, 32768))
"""Requests, and tokens of each: decode, turns, prefill."""
ROTATED_BYTES = 192 << 20


@dataclasses.dataclass(frozen=True)
class Write:
    """k, v [B,Hk,S,D] for slots i64[B,S] of a cache [pages,2,Hk,PAGE,D]; page and place of each slot, for torch."""

    cache: Tensor
    k: Tensor
    v: Tensor
    slots: Tensor
    page: Tensor
    place: Tensor

    @property
    def bytes(self) -> int:
        """Read and written."""
        return 4 * self.k.numel() * self.k.element_size()


def write(shape: Shape, batch: int, tokens: int, device: str = "cuda") -> Write:
    """Random operands; consecutive tokens on the same page, pages in random order."""
    pages = batch * -(-tokens // PAGE)
    cache = torch.zeros(pages, 2, shape.kv_heads, PAGE, shape.width, device=device, dtype=DTYPE)
    k, v = (
        torch.randn(batch, tokens, shape.kv_heads, shape.width, device=device, dtype=DTYPE).transpose(1, 2)
        for _ in range(2)
    )
    table, at = torch.randperm(pages, device=device).view(batch, -1), torch.arange(tokens, device=device)
    page, place = table[:, at // PAGE], (at % PAGE).expand(batch, -1)
    return Write(cache, k, v, page * PAGE + place, page, place)


def measure(shape: Shape) -> Iterator[dict[str, Any]]:
    """One row per size and contender. The check: both leave the same bits in the cache."""
    kernels.register()
    copy = copy_tbps()
    runs: dict[str, Callable[[Write], None]] = {"ours": ours, "torch": indexed}
    for batch, tokens in SIZES:
        first = write(shape, batch, tokens)
        count = max(2, min(24, ROTATED_BYTES // first.bytes))
        writes = [first, *(write(shape, batch, tokens) for _ in range(count - 1))]
        equal = same_bits(first)
        times = interleaved({n: graphed(run, writes, REPEATS) for n, run in runs.items()}, [None], 100) if equal else {}
        for name in runs:
            row = {"op": "kv_write", "by": name, "batch": batch, "length": tokens, "shape": f"{shape}, B{batch}"}
            row |= {"bit_equal": equal, "ms": None, "clocks": clocks()}
            if name in times:
                ms = times[name].median / REPEATS
                tbps = first.bytes / ms / 1e9
                row |= {"ms": ms, "tbps": tbps, "of_ideal": tbps / copy}
            yield row
        torch.cuda.empty_cache()


def same_bits(x: Write) -> bool:
    """Whether ours leaves in the cache what torch's indexed write does; the cache is as before afterwards."""
    before, found = x.cache.clone(), []
    for run in (ours, indexed):
        x.cache.copy_(before)
        run(x)
        found.append(x.cache.clone())
    x.cache.copy_(before)
    return torch.equal(*found) and not torch.equal(found[0], before)


def ours(x: Write) -> None:
    """The op."""
    torch.ops.fluxc.kv_write(x.cache, x.k, x.v, x.slots)


def indexed(x: Write) -> None:
    """Two indexed writes."""
    x.cache[x.page, 0, :, x.place] = x.k.transpose(1, 2)
    x.cache[x.page, 1, :, x.place] = x.v.transpose(1, 2)
