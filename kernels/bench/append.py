"""A further turn over a kept cache, inside a CUDA graph, against SDPA over contiguous keys: all kept, and a ring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxc import kernels
from fluxc.kernels.bench.cases import Shape
from fluxc.kernels.bench.measure import clocks, graphed, interleaved
from fluxc.kernels.bench.operands import TOLERANCE
from fluxc.kernels.schemas import PAGE

DTYPE = torch.bfloat16
REPEATS = 5
KEPT = 32768
TURNS = (64, 512)
RINGS = ((0, 0), (128, 2048))
"""Sink and window; 0, 0: a full layer. A ring of 2,176 slots under 32K tokens has wrapped 14 times."""
CACHES_BYTES = 192 << 20


@dataclasses.dataclass(frozen=True)
class Turn:
    """q [1,H,T,D] after `start` tokens, the cache they left, and keys and values [1,Hk,start+T,D] of all positions.

    `held`: the positions whose keys the cache still has, by slot.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cache: Tensor
    table: Tensor
    held: Tensor
    sink: int
    window: int

    @property
    def start(self) -> int:
        """Tokens before the turn."""
        return self.k.shape[2] - self.q.shape[2]

    def seen(self, positions: Tensor, dense: bool = False) -> Tensor:
        """Whether each row of the turn sees keys at these positions: bool [T,len(positions)]."""
        i = torch.arange(self.start, self.k.shape[2], device=positions.device)[:, None]
        causal = positions <= i
        if dense or not self.window:
            return causal
        return causal & ((positions < self.sink) | (i - positions < self.window))

    def visible(self) -> Tensor:
        """Positions in the cache, then those of the turn."""
        return torch.cat([self.held, torch.arange(self.start, self.k.shape[2], device=self.held.device)])


def turn(shape: Shape, kept: int, rows: int, sink: int, window: int, device: str = "cuda") -> Turn:
    """Random operands; the pages of the cache in random order."""
    total, dtype = kept + rows, DTYPE if device == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, n, heads, shape.width, device=device, dtype=dtype).transpose(1, 2)
        for n, heads in ((rows, shape.heads), (total, shape.kv_heads), (total, shape.kv_heads))
    )
    held = torch.arange(kept if not window else min(kept, sink + window), device=device)
    if window:
        held = torch.where(held < sink, held, kept - 1 - (kept - 1 - held) % window)
    pages = -(-len(held) // PAGE)
    table = torch.randperm(pages, device=device).int()[None]
    slots = torch.zeros(2, shape.kv_heads, pages * PAGE, shape.width, device=device, dtype=dtype)
    slots[:, :, : len(held)] = torch.stack([k[0, :, held], v[0, :, held]])
    cache = torch.empty(pages, 2, shape.kv_heads, PAGE, shape.width, device=device, dtype=dtype)
    cache[table[0].long()] = slots.unflatten(2, (pages, PAGE)).permute(2, 0, 1, 3, 4)
    return Turn(q, k, v, cache, table, held, sink, window)


def measure(shape: Shape) -> Iterator[dict[str, Any]]:
    """One row per kind of layer, length of a turn and contender; ideal: flash over all keys x the visible share."""
    kernels.register()
    for sink, window in RINGS:
        for rows in TURNS:
            yield from _compare(shape, rows, sink, window)
            torch.cuda.empty_cache()


def _compare(shape: Shape, rows: int, sink: int, window: int) -> Iterator[dict[str, Any]]:
    first = turn(shape, KEPT, rows, sink, window)
    count = max(2, min(12, CACHES_BYTES // (first.cache.numel() * first.cache.element_size())))
    turns = [first, *(turn(shape, KEPT, rows, sink, window) for _ in range(count - 1))]
    runs = contenders(turns, shape.width**-0.5)
    errors = {name: error(run, first, shape.width**-0.5, dense=name.startswith("flash")) for name, run in runs.items()}
    graphs = {name: graphed(run, turns, REPEATS) for name, run in runs.items() if errors[name] < TOLERANCE[DTYPE]}
    times = interleaved(graphs, [None], 200)
    pairs = {dense: int(first.seen(torch.arange(KEPT + rows, device="cuda"), dense).sum()) for dense in (False, True)}
    kept = f"{sink} + {window} kept" if window else "all kept"
    for name, found in errors.items():
        row = {"op": "append_attention", "by": name, "length": KEPT, "turn": rows, "sink": sink, "window": window}
        row |= {"shape": f"{shape}, turn of {rows}, {kept}", "error": found, "ms": None, "clocks": clocks()}
        if name in times:
            ms, own = times[name].median / REPEATS, pairs[name.startswith("flash")]
            row |= {"ms": ms, "tflops": 4 * own * shape.heads * shape.width / ms / 1e9}
            if FLASH in times:
                row["of_ideal"] = times[FLASH].median / REPEATS * own / pairs[True] / ms
        yield row


FLASH = "flash, all keys"


def contenders(turns: list[Turn], scale: float) -> dict[str, Callable[[Turn], Tensor]]:
    """By name, what gives the turn's output [1,T,H,D]. SDPA gets keys, masks and repeated heads ahead of time."""
    kept = {id(x): [y[:, :, x.visible()].contiguous() for y in (x.k, x.v)] for x in turns}
    masks = {id(x): x.seen(x.visible()) for x in turns}
    group = turns[0].q.shape[1] // turns[0].k.shape[1]
    repeated = {key: [y.repeat_interleave(group, 1) for y in pair] for key, pair in kept.items()}
    slots = torch.tensor([len(turns[0].held)], device=turns[0].q.device, dtype=torch.int32)
    start, sinks, windows = (slots.long() * 0 + n for n in (turns[0].start, turns[0].sink, turns[0].window))

    def ours(x: Turn) -> Tensor:
        own = x.q, x.k[:, :, x.start :], x.v[:, :, x.start :], x.cache, x.table
        return torch.ops.fluxc.append_attention(*own, slots, start, sinks, windows, scale=scale, layer=0)

    def masked(backend: SDPBackend, keys: dict[int, list[Tensor]], gqa: bool) -> Callable[[Turn], Tensor]:
        def run(x: Turn) -> Tensor:
            k, v = keys[id(x)]
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(x.q, k, v, masks[id(x)], scale=scale, enable_gqa=gqa)
            return out.transpose(1, 2)

        return run

    def flash(x: Turn) -> Tensor:
        # Its diagonal ends in the last key, that of F.scaled_dot_product_attention starts in the first.
        out = torch.ops.aten._scaled_dot_product_flash_attention(x.q, x.k, x.v, 0.0, True, scale=scale)
        return out[0].transpose(1, 2)

    return {
        "ours": ours,
        "cuDNN, same mask": masked(SDPBackend.CUDNN_ATTENTION, kept, True),
        "efficient, same mask, heads repeated": masked(SDPBackend.EFFICIENT_ATTENTION, repeated, False),
        FLASH: flash,
    }


def error(run: Callable[[Turn], Tensor], x: Turn, scale: float, dense: bool) -> float:
    """The contender's relative error against fp32 with its own mask; not a number if it refuses the case."""
    try:
        found = run(x).float()
    except RuntimeError:
        return float("nan")
    wanted = reference(x, scale, dense)
    return ((found - wanted).norm() / wanted.norm()).item()


def reference(x: Turn, scale: float, dense: bool = False) -> Tensor:
    """[1,T,H,D] in fp32 from the keys of all positions, one key head at a time."""
    hidden = ~x.seen(torch.arange(x.k.shape[2], device=x.k.device), dense)
    heads = []
    for n, q in enumerate(x.q[0].float().unflatten(0, (x.k.shape[1], -1))):
        p = torch.softmax((q @ x.k[0, n].float().T * scale).masked_fill(hidden, float("-inf")), -1)
        heads.append(p @ x.v[0, n].float())
    return torch.cat(heads).transpose(0, 1)[None]
