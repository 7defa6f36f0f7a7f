"""The tile sizes of the Triton attention kernels: one pinned entry per architecture and head dim.

Kernels inside an exported conditional are not autotuned reliably, so nothing is tuned at run time. docs/kernels.md
says how each entry was found.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

from fluxc.errors import InternalError

Loader = Literal["gluon", "tma", "pointer"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one attention kernel cuts its work."""

    loader: Loader
    """`gluon`: triton_hopper.py. `tma` and `pointer`: triton_forward.py with descriptor or plain loads."""
    rows: int = 128
    """Query rows of a program."""
    keys: int = 128
    """Keys of a tile."""
    warps: int = 8
    stages: int = 3
    """Key tiles in flight."""
    wait_last: bool = True
    """Gluon only: wait for the value product after the exponentials instead of where ptxas puts the wait."""
    head_major: bool = True
    """Gluon over lists of blocks only: the heads that share keys one after the other, so that their keys stay in the
    L2 cache, instead of all heads at once."""


# Head dims are rounded up to a power of two: 80 and 96 use 128. Architectures without an entry use the next lower one.
TILES: dict[tuple[int, int], Tiles] = {
    (80, 64): Tiles("pointer", rows=128, keys=64, warps=4, stages=3),
    (80, 128): Tiles("pointer", rows=128, keys=64, warps=8, stages=2),
    (80, 256): Tiles("pointer", rows=64, keys=32, warps=4, stages=2),
    (89, 64): Tiles("pointer", rows=128, keys=64, warps=4, stages=2),
    (89, 128): Tiles("pointer", rows=128, keys=32, warps=8, stages=2),
    (89, 256): Tiles("pointer", rows=64, keys=32, warps=4, stages=1),
    (90, 64): Tiles("gluon", stages=4),
    (90, 128): Tiles("gluon", stages=2),
    (90, 256): Tiles("gluon", keys=64, stages=2),
    (100, 64): Tiles("tma", rows=128, keys=128, warps=4, stages=3),
    (100, 128): Tiles("tma", rows=128, keys=64, warps=4, stages=3),
    (100, 256): Tiles("tma", rows=64, keys=64, warps=4, stages=2),
    (120, 64): Tiles("pointer", rows=128, keys=64, warps=4, stages=2),
    (120, 128): Tiles("pointer", rows=128, keys=32, warps=8, stages=2),
    (120, 256): Tiles("pointer", rows=64, keys=32, warps=4, stages=1),
}
PLAIN_TMA: dict[int, Tiles] = {
    64: Tiles("tma", rows=128, keys=128, warps=8, stages=3),
    128: Tiles("tma", rows=128, keys=128, warps=8, stages=3),
    256: Tiles("tma", rows=64, keys=64, warps=4, stages=2),
}
"""sm_90 where the Gluon kernel cannot serve a call."""
POINTER_90: dict[int, Tiles] = {
    64: Tiles("pointer", rows=128, keys=128, warps=8, stages=2),
    128: Tiles("pointer", rows=128, keys=64, warps=8, stages=3),
    256: Tiles("pointer", rows=64, keys=64, warps=4, stages=2),
}
BLOCKS_90: dict[int, Tiles] = {
    64: Tiles("gluon", stages=4),
    128: Tiles("gluon", stages=2),
    256: Tiles("gluon", keys=64, stages=2),
}
"""Attention over lists of key blocks on sm_90; elsewhere it takes the sizes of full attention."""
FULL_PRECISION: dict[tuple[int, int], Tiles] = {
    (80, 64): Tiles("pointer", rows=64, keys=64, warps=4, stages=2),
    (80, 128): Tiles("pointer", rows=64, keys=32, warps=4, stages=1),
    (80, 256): Tiles("pointer", rows=32, keys=16, warps=4, stages=1),
    (90, 64): Tiles("pointer", rows=128, keys=64, warps=8, stages=2),
    (90, 128): Tiles("pointer", rows=64, keys=32, warps=4, stages=2),
    (90, 256): Tiles("pointer", rows=64, keys=32, warps=8, stages=1),
    (120, 64): Tiles("pointer", rows=64, keys=64, warps=4, stages=2),
    (120, 128): Tiles("pointer", rows=64, keys=32, warps=4, stages=1),
    (120, 256): Tiles("pointer", rows=32, keys=16, warps=4, stages=1),
}
"""fp32 operands, multiplied as TF32 or, at full precision, as three TF32 products."""
INTERPRETED = Tiles("pointer", rows=16, keys=16, warps=4, stages=1)
"""The Triton interpreter: small tiles, so that short tests cross many tile edges."""


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """How the gradient kernels cut their work: dq owns rows and visits keys, dkv owns keys and visits rows."""

    dq_rows: int = 128
    dq_keys: int = 64
    dq_warps: int = 8
    dq_stages: int = 2
    dkv_rows: int = 64
    dkv_keys: int = 128
    dkv_warps: int = 8
    dkv_stages: int = 2


BACKWARD: dict[tuple[int, int], BackwardTiles] = {
    (80, 64): BackwardTiles(64, 64, 4, 2, 32, 128, 8, 2),
    (80, 128): BackwardTiles(64, 64, 4, 2, 32, 128, 8, 2),
    (80, 256): BackwardTiles(32, 32, 4, 1, 32, 64, 8, 1),
    (89, 64): BackwardTiles(64, 32, 4, 1, 32, 64, 4, 1),
    (89, 128): BackwardTiles(32, 32, 4, 1, 32, 64, 8, 1),
    (89, 256): BackwardTiles(16, 16, 4, 1, 16, 16, 4, 1),
    (90, 64): BackwardTiles(64, 64, 4, 2, 32, 128, 8, 3),
    (90, 128): BackwardTiles(64, 64, 4, 2, 64, 128, 8, 3),
    (90, 256): BackwardTiles(64, 32, 4, 1, 32, 64, 8, 1),
    (120, 64): BackwardTiles(64, 32, 4, 1, 32, 64, 4, 1),
    (120, 128): BackwardTiles(32, 32, 4, 1, 32, 64, 8, 1),
    (120, 256): BackwardTiles(16, 16, 4, 1, 16, 16, 4, 1),
}


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Sizes of the decode kernel."""

    warps: int = 4
    buffers: int = 3
    """Pages in flight; 0: none is loaded ahead."""
    waves: int = 2
    """Programs of a multiprocessor that splits aim at."""
    registers: int = 64
    """Registers of a thread for parts that are added up at once."""
    dependent: bool = False
    """Launch before the kernel ahead of it has finished, and wait inside (sm_90 and later)."""
    ahead: int = 0
    """Pages of a program asked for in the L2 cache before that wait."""


DECODE: dict[tuple[int, int], DecodeTiles] = {
    (80, 64): DecodeTiles(buffers=4),
    (80, 128): DecodeTiles(buffers=4, waves=1),
    (80, 256): DecodeTiles(buffers=2, waves=1),
    (89, 64): DecodeTiles(),
    (89, 128): DecodeTiles(buffers=2, waves=1),
    (89, 256): DecodeTiles(buffers=1, waves=1),
    (90, 64): DecodeTiles(waves=1, dependent=True, ahead=2),
    (90, 128): DecodeTiles(buffers=2, waves=1, dependent=True, ahead=1),
    (90, 256): DecodeTiles(buffers=2, waves=1),
    (120, 64): DecodeTiles(),
    (120, 128): DecodeTiles(buffers=2, waves=1),
    (120, 256): DecodeTiles(buffers=1, waves=1),
}
DECODE_FULL_PRECISION: dict[tuple[int, int], DecodeTiles] = {
    (80, 64): DecodeTiles(buffers=4, waves=1),
    (80, 128): DecodeTiles(buffers=1, waves=1),
    (89, 64): DecodeTiles(buffers=2, waves=1),
    (89, 128): DecodeTiles(buffers=0, waves=1),
    (90, 64): DecodeTiles(buffers=4, waves=1),
    (90, 128): DecodeTiles(buffers=2, waves=1),
    (120, 64): DecodeTiles(buffers=2, waves=1),
    (120, 128): DecodeTiles(buffers=0, waves=1),
}
"""fp32 heads and caches; rearranging their keys takes shared memory of its own."""


@dataclasses.dataclass(frozen=True)
class RouterTiles:
    """How the router's two kernels cut their work."""

    parts: int = 32
    """Programs of the encoder and head for a request; they wait for each other."""
    warps: int = 8
    pool_parts: int = 64
    """Programs that sum a request's pooled rows."""
    rows: int = 128
    """Pooled rows that a program loads at once."""
    pool_warps: int = 8
    dependent: bool = False
    """Start each kernel before the one ahead of it has finished, and wait inside (sm_90 and later)."""


ROUTER: dict[int, RouterTiles] = {80: RouterTiles(), 90: RouterTiles(warps=4, dependent=True)}
"""By architecture; others use the next lower one."""


BACKWARD_FULL_PRECISION: dict[tuple[int, int], BackwardTiles] = {
    (80, 64): BackwardTiles(64, 32, 4, 1, 32, 32, 4, 1),
    (80, 128): BackwardTiles(32, 32, 4, 1, 32, 32, 4, 1),
    (80, 256): BackwardTiles(16, 16, 4, 1, 16, 16, 4, 1),
}
BACKWARD_INTERPRETED = BackwardTiles(16, 16, 4, 1, 16, 16, 4, 1)


SCORE_CHUNKS = 64
"""Chunks of a block that a tile of block scores always holds."""


@dataclasses.dataclass(frozen=True)
class ScoreTiles:
    """Sizes of the product of block scores: chunks of queries and of keys, columns at a time (0: the whole head)."""

    rows: int = 128
    keys: int = 128
    depth: int = 0
    warps: int = 8
    stages: int = 3
    tma: bool = False


SCORES_90 = ScoreTiles(128, 256, 64, 8, 4, True)
"""fp16 and bf16 on sm_90. A head of 64 takes 16 steps of 48 KiB, one of 128 32, at a stride of 16."""
SCORES_INTERPRETED = ScoreTiles(16, 16, warps=4, stages=1)
SHARED_BYTES = {80: 160 << 10, 86: 96 << 10, 89: 96 << 10, 90: 220 << 10, 100: 220 << 10, 120: 96 << 10}
"""Shared memory of a program, a little below the architecture's limit."""


@dataclasses.dataclass(frozen=True)
class AppendTiles:
    """Sizes of the append kernel: rows of a program, keys of a tile of the turn's own."""

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


APPEND: dict[int, AppendTiles] = {
    64: AppendTiles(),
    128: AppendTiles(stages=1),
    256: AppendTiles(rows=32, keys=32, stages=1),
}
"""By head dim, for all architectures but sm_90 and for fp32."""
APPEND_90: dict[int, AppendTiles] = {
    64: AppendTiles(rows=128, warps=8, stages=3),
    128: AppendTiles(rows=128, warps=8, stages=3),
    256: AppendTiles(rows=64, keys=32, warps=4, stages=1),
}
APPEND_INTERPRETED = AppendTiles(16, 16)


def padded(width: int) -> int:
    """The power of two a head of `width` is computed at."""
    return max(16, 1 << (width - 1).bit_length())


def tiles_for(capability: int, width: int) -> Tiles:
    """The pinned entry for heads of `width` on sm_`capability`; raises InternalError if there is none."""
    return _nearest(TILES, capability, width)


def blocks_for(capability: int, width: int) -> Tiles:
    """The pinned entry of attention over lists of key blocks."""
    return BLOCKS_90[max(64, padded(width))] if capability // 10 == 9 else tiles_for(capability, width)


def full_precision_for(capability: int, width: int) -> Tiles:
    """The pinned entry for fp32 operands."""
    return _nearest(FULL_PRECISION, capability, width)


def backward_for(capability: int, width: int) -> BackwardTiles:
    """The pinned entry of the gradient kernels."""
    return _nearest(BACKWARD, capability, width)


def backward_full_precision_for(capability: int, width: int) -> BackwardTiles:
    """The pinned entry of the gradient kernels for fp32 operands."""
    return _nearest(BACKWARD_FULL_PRECISION, capability, width)


def decode_for(capability: int, width: int, full_precision: bool = False) -> DecodeTiles:
    """The pinned entry of the decode kernel, or that for fp32 operands."""
    return _nearest(DECODE_FULL_PRECISION if full_precision else DECODE, capability, width)


def router_for(capability: int) -> RouterTiles:
    """The pinned entry of the router's kernels."""
    return ROUTER[max(arch for arch in ROUTER if arch <= capability)]


def _nearest(table: dict[tuple[int, int], T], capability: int, width: int) -> T:
    dim = max(64, padded(width))
    known = [arch for arch, of in table if arch <= capability and of == dim]
    if not known:
        raise InternalError(f"no Triton tile sizes for heads of {width} on sm_{capability}")
    return table[max(known), dim]


def append_for(capability: int, width: int) -> AppendTiles:
    """The sizes of the append kernel on sm_`capability`; 0 for fp32, 1 for the interpreter."""
    if capability == 1:
        return APPEND_INTERPRETED
    return (APPEND_90 if capability // 10 == 9 else APPEND)[max(64, padded(width))]


def scores_for(capability: int, row_bytes: int) -> ScoreTiles:
    """The sizes of block scores without TMA for queries and keys of `row_bytes`."""
    room = SHARED_BYTES[max(arch for arch in SHARED_BYTES if arch <= capability)]
    tile = 128 if 4 * 128 * row_bytes <= room else 64
    return ScoreTiles(tile, tile, warps=8 if tile >= 128 else 4, stages=max(1, min(3, room // (2 * tile * row_bytes))))
