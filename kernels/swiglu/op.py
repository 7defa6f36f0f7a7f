"""`fluxc::swiglu`: silu(gate) * up in one pass over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.define import Provider, choose, define_plain, triton_provider


def define() -> None:
    """Define torch.ops.fluxc.swiglu."""
    define_plain("swiglu", run, lambda gate, up: gate.new_empty(gate.shape))


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("swiglu"), Provider("torch", lambda *args: None, _composed)


def run(gate: Tensor, up: Tensor) -> Tensor:
    """Output of gate's shape by the first provider that takes the call; raises UserError if `up` is unlike `gate`."""
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        found = f"{up.dtype} {tuple(up.shape)} on {up.device}"
        raise UserError(f"fluxc::swiglu: up is {found}, gate is {gate.dtype} {tuple(gate.shape)} on {gate.device}")
    return choose("swiglu", providers(), gate, up).run(gate, up)


def _composed(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) * up).contiguous(memory_format=torch.contiguous_format)
