"""The residual sum with its norm, and SwiGLU, in Triton: one pass over memory each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxc.kernels.triton_launch import interpreted

BLOCK = 1024
WIDEST = 32768


@triton.jit
def norm_kernel(x, residual, weight, normed, total, eps, W: tl.constexpr, WIDTH: tl.constexpr):
    """One row of x, residual [N,W] a program -> normed and total [N,W], all contiguous."""
    row = tl.program_id(0).to(tl.int64) * W
    c = tl.arange(0, WIDTH)
    b_x = tl.load(x + row + c, mask=c < W, other=0.0).to(tl.float32)
    b_r = tl.load(residual + row + c, mask=c < W, other=0.0).to(tl.float32)
    rounded = (b_x + b_r).to(x.dtype.element_ty)
    tl.store(total + row + c, rounded, mask=c < W)
    wide = rounded.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / W + eps)).to(x.dtype.element_ty)
    b_w = tl.load(weight + c, mask=c < W, other=0.0)
    out = scaled.to(tl.float32) * b_w.to(tl.float32)
    tl.store(normed + row + c, out.to(x.dtype.element_ty), mask=c < W)


@triton.jit
def swiglu_kernel(gate, up, out, n, rows_step_gate, rows_step_up, W, BLOCK: tl.constexpr):
    """BLOCK columns of one row a program: gate, up [N,W], rows apart by their steps -> out [N,W], contiguous."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * rows_step_gate + c, mask=c < W, other=0.0).to(tl.float32)
    u = tl.load(up + row * rows_step_up + c, mask=c < W, other=0.0).to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * W + c, (activated * u).to(out.dtype.element_ty), mask=c < W)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """`fluxc::add_rms_norm` -> (normalised, sum), contiguous."""
    width = x.shape[-1]
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    block = triton.next_power_of_2(width)
    norm_kernel[(x.numel() // width,)](
        x.contiguous(), residual.contiguous(), weight.contiguous(), normed, total, eps, W=width, WIDTH=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return normed, total


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`fluxc::swiglu`, contiguous. Halves of one merged projection are read where they lie."""
    width = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows = [_rows(x, width) for x in (gate, up)]
    swiglu_kernel[(gate.numel() // width, triton.cdiv(width, BLOCK))](
        *rows, out, gate.numel(), rows[0].stride(0), rows[1].stride(0), width, BLOCK=BLOCK, num_warps=4
    )
    return out


def _rows(x: Tensor, width: int) -> Tensor:
    """x [..,W] as [N,W] with columns side by side; a copy only where its rows are not evenly apart."""
    flat = x.reshape(-1, width)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {x.dtype} is not fp16, bf16 or fp32"
    if interpreted() and x.dtype == torch.bfloat16:
        return "bf16 is wrong in the Triton interpreter"
    if x.numel() == 0 or x.dim() == 0:
        return "nothing to do"
    return None if x.shape[-1] <= WIDEST else f"rows of {x.shape[-1]} are wider than {WIDEST}"
