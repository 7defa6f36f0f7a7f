"""One prefill of any `Programs` outside the scheduler: logits of chosen rows and the routes, as tensors on the host."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluxc.engine.programs import Prefilled


@torch.no_grad()
def whole_prefill(
    programs: Any, ids: Sequence[int], prompt_len: int, rows: Sequence[int], bias: Tensor, *, dense: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits fp32 [N,V] of the rows and routes bool[L]; bias fp32 [L]. `dense` as in `Programs.prefill`."""
    given = ([list(ids)], [prompt_len], bias.float().cpu().numpy()[:, None], [list(rows)])
    inputs: list[Any] = [np.asarray(value, np.float32 if at == 2 else np.int64) for at, value in enumerate(given)]
    if isinstance(programs.dtype, torch.dtype):
        inputs = [torch.from_numpy(value).to(programs.device) for value in inputs]
    # Keys and values of one layer at a time: those of a long prompt in all layers fill a device.
    last = collections.deque(programs.prefill(*inputs, dense=dense), maxlen=1).pop()
    assert isinstance(last, Prefilled)
    return torch.as_tensor(last.logits)[0].float().cpu(), torch.as_tensor(last.routes).bool().cpu()
