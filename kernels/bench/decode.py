"""Decode over a paged cache, inside a CUDA graph, against SDPA on a contiguous cache of the same length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fluxc.kernels.bench.cases import Shape
from fluxc.kernels.bench.measure import clocks, copy_tbps, graphed, interleaved
from fluxc.kernels.bench.operands import TOLERANCE
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.triton_config import DecodeTiles, decode_for
from fluxc.kernels.triton_decode import decode_attention

DTYPE = torch.bfloat16
REPEATS = 20
SIZES = ((1, 2176), (1, 8192), (8, 8192), (1, 32768), (1, 131072))
VARIANTS = tuple(
    DecodeTiles(4, buffers, waves, dependent=ahead >= 0, ahead=max(ahead, 0))
    for buffers, waves, ahead in ((4, 1, -1), (2, 1, -1), (2, 1, 0), (2, 1, 1), (2, 1, 2), (4, 1, 1), (2, 2, 1))
)
CACHES_BYTES = 192 << 20


@dataclasses.dataclass(frozen=True)
class Step:
    """q [B,H,D] and one layer's cache, paged and contiguous [B,Hk,T,D]."""

    q: Tensor
    cache: Tensor
    table: Tensor
    lens: Tensor
    k: Tensor
    v: Tensor


def step(batch: int, length: int, shape: Shape) -> Step:
    """Random operands; pages in random order."""
    pages = length // PAGE
    cache = torch.randn(batch * pages, 2, shape.kv_heads, PAGE, shape.width, device="cuda", dtype=DTYPE)
    table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
    slots = cache[table.long()].permute(2, 0, 3, 1, 4, 5).reshape(2, batch, shape.kv_heads, length, shape.width)
    q = torch.randn(batch, shape.heads, shape.width, device="cuda", dtype=DTYPE)
    lens = torch.full((batch,), length, device="cuda", dtype=torch.int32)
    return Step(q, cache, table, lens, slots[0], slots[1])


def measure(shape: Shape, variants: bool) -> Iterator[dict[str, Any]]:
    """One row per size and contender: time of a call, bytes of the cache over it, and that as a share of copy speed."""
    copy = copy_tbps()
    for batch, length in SIZES:
        size = 4 * batch * length * shape.kv_heads * shape.width
        steps = [step(batch, length, shape) for _ in range(max(2, min(12, CACHES_BYTES // size)))]
        runs = _runs(shape, variants)
        wanted = _reference(steps[0])
        errors = {name: _error(run, steps[0], wanted) for name, run in runs.items()}
        graphs = {name: graphed(run, steps, REPEATS) for name, run in runs.items() if errors[name] < TOLERANCE[DTYPE]}
        times = interleaved(graphs, [None], 300)
        for name, error in errors.items():
            row = {"op": "decode_attention", "by": name, "batch": batch, "length": length, "shape": str(shape)}
            row |= {"dtype": str(DTYPE), "error": error, "clocks": clocks(), "ms": None}
            if name in times:
                ms = times[name].median / REPEATS
                row |= {"ms": ms, "tbps": size / ms / 1e9, "of_ideal": size / ms / 1e9 / copy}
            yield row
        del steps, graphs
        torch.cuda.empty_cache()


def _runs(shape: Shape, variants: bool) -> dict[str, Any]:
    scale = shape.width**-0.5

    def ours(tiles: DecodeTiles) -> Any:
        return lambda x: decode_attention(x.q, x.cache, x.table, x.lens, scale=scale, tiles=tiles)

    def sdpa(backend: SDPBackend) -> Any:
        def run(x: Step) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(x.q[:, :, None], x.k, x.v, enable_gqa=True)[:, :, 0]

        return run

    runs = {"ours": ours(decode_for(90, shape.width))}
    for tiles in VARIANTS if variants else ():
        early = f", {tiles.ahead} pages early" if tiles.dependent else ""
        runs[f"ours {tiles.buffers} buffers, {tiles.waves} waves{early}"] = ours(tiles)
    return runs | {"cudnn": sdpa(SDPBackend.CUDNN_ATTENTION), "flash": sdpa(SDPBackend.FLASH_ATTENTION)}


def _error(run: Any, x: Step, wanted: Tensor) -> float:
    """The contender's relative error; not a number if it refuses the case."""
    try:
        return ((run(x).float() - wanted).norm() / wanted.norm()).item()
    except RuntimeError:
        return float("nan")


def _reference(x: Step) -> Tensor:
    group = x.q.shape[1] // x.k.shape[1]
    q = x.q.float().view(x.q.shape[0], x.k.shape[1], group, -1)
    p = torch.softmax(q @ x.k.float().transpose(2, 3) * x.q.shape[2] ** -0.5, 3)
    return (p @ x.v.float()).reshape(x.q.shape)
