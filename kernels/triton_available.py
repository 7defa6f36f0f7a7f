"""Whether Triton kernels can run on a tensor at all, asked without importing Triton."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor


def unavailable(x: Tensor) -> str | None:
    """Why no Triton kernel can run on the device of x, or None. The interpreter runs them on CPU tensors."""
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
