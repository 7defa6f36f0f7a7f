"""Block-sparse attention at several densities, and what finding the blocks costs, against dense cuDNN SDPA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fluxc import kernels
from fluxc.kernels import triton_scores
from fluxc.kernels.bench.cases import Case
from fluxc.kernels.bench.contenders import sdpa
from fluxc.kernels.bench.measure import clocks, interleaved
from fluxc.kernels.bench.operands import TOLERANCE, Operands, operands
from fluxc.kernels.density import block_density
from fluxc.kernels.triton_config import ScoreTiles

DTYPE = torch.bfloat16
BLOCK = 128
SIZES = ((16384, (0.25,)), (32768, (0.05, 0.1, 0.25, 0.5)), (131072, (0.05, 0.1, 0.25, 0.5)))
SCORED = (32768, 131072)
SCORERS = (("antidiagonal", 16), ("antidiagonal", 8), ("pooled", 16))
THRESHOLD = 0.9
SAMPLED = 24  # rows whose result is checked


@dataclasses.dataclass(frozen=True)
class Lists:
    """Key blocks of each block of queries, and the share of the causal pairs they hold."""

    index: Tensor
    count: Tensor
    density: float


VARIANTS = (
    ScoreTiles(256, 128, 64, 8, 4, tma=True),
    ScoreTiles(128, 128, 64, 8, 3, tma=True),
    ScoreTiles(128, 256, 64, 8, 3, tma=True),
    ScoreTiles(128, 256, 64, 8, 4, tma=False),
)


def measure(variants: bool = False) -> Iterator[dict[str, Any]]:
    """One row per length, density and contender; then one per length and scorer, with `variants` by tile sizes too."""
    kernels.register()
    for length, shares in SIZES:
        case = Case("block_attention", length)
        inputs = [operands(case, DTYPE) for _ in range(2)]
        for share in shares:
            lists = random_lists(case, share)
            yield from _attention(case, inputs, lists)
        del inputs
        torch.cuda.empty_cache()
    for length in SCORED:
        yield from _scores(Case("block_scores", length), variants)


def random_lists(case: Case, share: float) -> Lists:
    """Each block of queries reads its own block, the first, and others at random: about `share` of all."""
    blocks = case.length // BLOCK
    always = torch.eye(blocks, dtype=torch.bool, device="cuda")
    always[:, 0] = True
    picked = torch.rand(1, case.shape.heads, blocks, blocks, device="cuda") < share - 2 / blocks
    picked = (picked | always).tril()
    count = picked.sum(-1).int()
    index = picked.int().argsort(dim=-1, descending=True, stable=True).int()
    return Lists(index, count, block_density(count, case.length, BLOCK))


def _attention(case: Case, inputs: list[Operands], lists: Lists) -> Iterator[dict[str, Any]]:
    scale = case.shape.width**-0.5

    def ours(x: Operands) -> Tensor:
        return torch.ops.fluxc.block_attention(*x, lists.index, lists.count, scale=scale, layer=0, block=BLOCK)

    runs = {"cudnn": sdpa(case.dense(), SDPBackend.CUDNN_ATTENTION), "ours": ours}
    error = _error(ours(inputs[0]), inputs[0], lists, scale)
    times = interleaved(runs, inputs, 500) if error < TOLERANCE[DTYPE] else {}
    for name in runs:
        row = {"op": case.op, "by": name, "length": case.length, "shape": str(case.shape), "density": lists.density}
        row |= {"error": error if name == "ours" else None, "ms": None, "clocks": clocks()}
        if times:
            row["ms"] = times[name].median
            row["of_ideal"] = times["cudnn"].median * (lists.density if name == "ours" else 1) / times[name].median
        yield row


def _error(out: Tensor, x: Operands, lists: Lists, scale: float) -> float:
    """Relative error of sampled rows of all heads against fp32; infinite if any element is not finite."""
    if not out.isfinite().all():
        return float("inf")
    (q, k, v), length = x, x[0].shape[2]
    group, found = q.shape[1] // k.shape[1], []
    for row in [0, BLOCK - 1, BLOCK, length - 1, *torch.randint(length, (SAMPLED,)).tolist()]:
        for h in range(0, q.shape[1], 5):
            n = int(lists.count[0, h, row // BLOCK])
            keys = lists.index[0, h, row // BLOCK, :n].long()[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")
            keys = keys[keys <= row]
            s = k[0, h // group, keys].float() @ q[0, h, row].float() * scale
            found.append((out[0, row, h].float(), torch.softmax(s, 0) @ v[0, h // group, keys].float()))
    actual, wanted = (torch.stack(side) for side in zip(*found, strict=True))
    return ((actual - wanted).norm() / wanted.norm()).item()


def _scores(case: Case, variants: bool) -> Iterator[dict[str, Any]]:
    inputs = [operands(case, DTYPE) for _ in range(2)]
    runs: dict[str, Any] = {"cudnn": sdpa(case.dense(), SDPBackend.CUDNN_ATTENTION)}
    errors: dict[str, float | None] = {"cudnn": None}
    tried: list[tuple[str, int, ScoreTiles | None]] = [(scorer, stride, None) for scorer, stride in SCORERS]
    tried += [("antidiagonal", 16, tiles) for tiles in VARIANTS if variants]
    for scorer, stride, tiles in tried:
        loads = "TMA" if tiles and tiles.tma else "plain loads"
        sizes = f", {tiles.rows} x {tiles.keys}, {tiles.stages} stages, {loads}" if tiles else ""
        name = f"ours, {scorer}, stride {stride}{sizes}"
        run = _scorer(scorer, stride, tiles)
        errors[name] = wrong_blocks(run, scorer, stride)
        if errors[name] < 1e-3:  # type: ignore[operator]
            runs[name] = run
    times = interleaved(runs, inputs, 500)
    for name, error in errors.items():
        row = {"op": case.op, "by": name, "length": case.length, "shape": str(case.shape), "error": error}
        ms = times[name].median if name in times else None
        yield row | {"ms": ms, "of_dense": ms / times["cudnn"].median if ms else None, "clocks": clocks()}
    torch.cuda.empty_cache()


def _scorer(scorer: str, stride: int, tiles: ScoreTiles | None = None) -> Any:
    how: dict[str, Any] = {"scale": 128**-0.5, "block": BLOCK, "stride": stride}
    how |= {"threshold": THRESHOLD, "scorer": scorer}
    if tiles:
        return lambda x: triton_scores.block_scores(x[0], x[1], **how, tiles=tiles)
    return lambda x: torch.ops.fluxc.block_scores(x[0], x[1], **how, layer=0)


def wrong_blocks(run: Any, scorer: str, stride: int) -> float:
    """Share of the blocks, away from the cut, on which kernel and reference disagree at a short length."""
    from fluxc.kernels.block_attention.reference import visible
    from fluxc.kernels.block_scores.reference import block_scores, block_sums

    x = operands(Case("block_scores", 4096 + 77), DTYPE)
    q, k, _ = x
    how = {"scale": 128**-0.5, "layer": 0, "block": BLOCK, "stride": stride, "threshold": THRESHOLD, "scorer": scorer}
    blocks = -(-q.shape[2] // BLOCK)
    index, counts = run(x)
    found = visible(index, counts, blocks, 1)
    wanted = visible(*block_scores(q.float(), k.float(), **how), blocks, 1)
    sums = block_sums(q.float(), k.float(), 128**-0.5, BLOCK, stride, scorer)
    edge = sums.masked_fill(~wanted, torch.inf).amin(-1, keepdim=True)
    off = (found != wanted) & ((sums - edge).abs() > 1e-2 * sums.sum(-1, keepdim=True))
    return off.float().mean().item()
