"""Launching the attention forward kernels: what they serve, which one serves a call, descriptors and grids."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import triton

from fluxc.kernels import triton_config as config
from fluxc.kernels.triton_forward import attention_forward
from fluxc.kernels.triton_tiles import FAR

if TYPE_CHECKING:
    from fluxc.kernels.triton_config import Tiles

LOG2E = 1.4426950408889634
GLUON_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Gluon changes between releases: only those the kernel was compiled with."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One attention over q [B,H,S,D], k [B,Hk,T,D], v [B,Hk,T,Dv]: who sees what. Names as in schemas.py."""

    scale: float
    sink: int = 0
    window: int = 0
    last: int = 0
    decode_full: bool = False
    prompt_lens: torch.Tensor | None = None
    """i64[B]; None when no row depends on the prompt's end."""
    route: torch.Tensor | None = None
    """bool[B]: the samples that see all keys; read on the device."""
    softcap: float = 0.0
    sink_logits: torch.Tensor | None = None
    q_start: torch.Tensor | None = None

    @property
    def sparse(self) -> bool:
        """Whether some row may not see all keys before it."""
        return self.window > 0


def interpreted() -> bool:
    """Whether kernels run in the Triton interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> str | None:
    """Why the Triton kernels cannot serve this call, or None if they can."""
    if not q.is_cuda and not interpreted():
        return "needs a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype} is not fp16, bf16 or fp32"
    if interpreted() and q.dtype == torch.bfloat16:
        return "bf16 is wrong in the Triton interpreter"
    if not q.dtype == k.dtype == v.dtype:
        return "q, k and v differ in dtype"
    return _unsupported_shape(q, k, v, call)


def _unsupported_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> str | None:
    widest = max(q.shape[-1], v.shape[-1])
    if widest > 256:
        return f"head dim {widest} is above 256"
    if q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        return f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads"
    if min(q.shape[0], q.shape[2], k.shape[2]) < 1:
        return "an empty batch or sequence"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last dimension of q, k or v is not contiguous"
    if call.scale <= 0:
        return f"scale {call.scale} is not positive"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0 or higher"
    return None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, tiles: Tiles | None = None) -> torch.Tensor:
    """Attention of a supported call -> [B,S,H,Dv], contiguous. `tiles` overrides the pinned sizes (benchmarks)."""
    return _attend(q, k, v, None, call, tiles)


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, tiles: Tiles | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend`, and the log-sum-exp of each row's scores, fp32 [B,H,S]."""
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _attend(q, k, v, lse, call, tiles), lse


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor | None, call: Call, tiles: Tiles | None
) -> torch.Tensor:
    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
    tiles = tiles or choose(q, k, v, call)
    launch = _launch_gluon if tiles.loader == "gluon" else _launch_plain
    launch(q, k, v, out, lse, call, tiles)
    return out


def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Tiles:
    """The pinned tile sizes for this call."""
    if not q.is_cuda:
        return config.INTERPRETED
    major, minor = torch.cuda.get_device_capability(q.device)
    capability = 10 * major + minor
    width = max(q.shape[-1], v.shape[-1])
    if q.dtype == torch.float32:
        return config.full_precision_for(capability, width)
    tiles = config.tiles_for(capability, width)
    if tiles.loader == "gluon" and not_gluon(q, k, v):
        tiles = config.PLAIN_TMA[max(64, config.padded(width))]
    if tiles.loader == "tma" and not_tma(q, k, v):
        tiles = config.POINTER_90[max(64, config.padded(width))]
    return tiles


def not_gluon(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why the Hopper kernel cannot serve this call, or None if it can."""
    if not triton.__version__.startswith(GLUON_VERSIONS):
        return f"Triton {triton.__version__} is not one of {', '.join(GLUON_VERSIONS)}"
    if q.shape[-1] != v.shape[-1]:
        return "the widths of q and v differ"
    return not_tma(q, k, v)


def not_tma(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why q, k, v cannot be read through TMA descriptors, or None if they can."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
        if x.data_ptr() % 16 or any(step <= 0 or step * x.element_size() % 16 for step in steps):
            return f"{name} is not aligned to 16 bytes"
    return None


def input_precision(q: torch.Tensor) -> str:
    """How fp32 operands are multiplied: as torch multiplies matrices, or with three TF32 products, 21 bits and more."""
    full = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if full else "tf32"


def flag(x: torch.Tensor | None) -> torch.Tensor | None:
    """A bool tensor as bytes, without a copy."""
    return x.view(torch.uint8) if x is not None and x.dtype == torch.bool else x


def _strides(x: torch.Tensor) -> list[int]:
    """Strides of x; a dimension of size 1 gets one that a TMA descriptor accepts."""
    return [x.stride(d) if x.shape[d] > 1 else 16 for d in range(3)] + [1]


def shape_arguments(q: torch.Tensor, k: torch.Tensor, call: Call, tile_rows: int) -> dict[str, int]:
    """The sizes every attention kernel takes, for tiles of `tile_rows` query rows."""
    n_tiles = triton.cdiv(q.shape[2], tile_rows)
    return {
        "heads": q.shape[1],
        "group": q.shape[1] // k.shape[1],
        "batch_heads": q.shape[0] * q.shape[1],
        "rows": q.shape[2],
        "keys": k.shape[2],
        "n_tiles": n_tiles,
        "sink": call.sink,
        "window": call.window or FAR.value,
        "last": call.last,
    }


def descriptors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, keys: int) -> tuple[Any, ...]:
    """TMA descriptors of q, k and v for tiles of `rows` and `keys` of one head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tiles = ((q, rows), (k, keys), (v, keys))
    return tuple(
        TensorDescriptor(x, list(x.shape), _strides(x), [1, 1, n, config.padded(x.shape[-1])]) for x, n in tiles
    )


def _options(call: Call) -> dict[str, object]:
    return {
        "SPARSE": call.sparse,
        "HAS_ROUTE": call.route is not None,
        "HAS_PROMPT": call.prompt_lens is not None,
        "DECODE_FULL": call.decode_full,
        "HAS_START": call.q_start is not None,
        "SINK_LOGITS": call.sink_logits is not None,
        "SOFTCAP": float(call.softcap),
        # Triton is about to change this default.
        **({} if interpreted() else {"enable_fp_fusion": True}),
    }


def gluon_descriptors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, keys: int) -> list[Any]:
    """TMA descriptors of the Hopper kernels: 64 rows of q and out, `keys` of k and v; out is [B,S,H,D]."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    width = max(64, config.padded(q.shape[-1]))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    blocks = [[1, 1, 64, width], [1, 1, keys, width], [1, 1, keys, width], [1, 64, 1, width]]
    return [
        TensorDescriptor(x, list(x.shape), _strides(x), block, layout)
        for x, block in zip((q, k, v, out), blocks, strict=True)
    ]


def _launch_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                  lse: torch.Tensor | None, call: Call, tiles: Tiles) -> None:  # fmt: skip
    sizes = shape_arguments(q, k, call, tiles.rows)
    width, width_v = config.padded(q.shape[-1]), config.padded(v.shape[-1])
    operands = descriptors(q, k, v, tiles.rows, tiles.keys) if tiles.loader == "tma" else (q, k, v)
    grid = (sizes["n_tiles"] * sizes["batch_heads"],)
    attention_forward[grid](
        *operands, out, call.sink_logits, flag(call.route), call.prompt_lens, call.q_start, lse,
        call.scale * LOG2E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **sizes,
        D=q.shape[-1], DV=v.shape[-1], WIDTH=width, WIDTH_V=width_v, BM=tiles.rows, BN=tiles.keys,
        STAGES=tiles.stages, TMA=tiles.loader == "tma", LSE=lse is not None,
        PRECISION=input_precision(q), **_options(call),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _launch_gluon(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                  lse: torch.Tensor | None, call: Call, tiles: Tiles) -> None:  # fmt: skip
    from fluxc.kernels.triton_hopper import hopper_forward

    sizes = shape_arguments(q, k, call, tiles.rows)
    width = max(64, config.padded(q.shape[-1]))
    n_items = sizes["n_tiles"] * sizes["batch_heads"]
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    hopper_forward[(min(n_items, processors),)](
        *gluon_descriptors(q, k, v, out, tiles.keys), call.sink_logits, flag(call.route), call.prompt_lens,
        call.q_start, lse, counter, call.scale * LOG2E,
        n_items=n_items, **sizes, D=width, BN=tiles.keys, STAGES=tiles.stages, WAIT_LAST=tiles.wait_last,
        LSE=lse is not None, **_options(call), num_warps=4,
        maxnreg=168,
    )  # fmt: skip
