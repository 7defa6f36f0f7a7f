"""Reference of `fluxc::swiglu`, fp32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in the dtype of the sums."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return F.silu(gate.to(wide)) * up.to(wide)
