"""One call of an attention op, whichever op it came from: its tensors, what its rows see, and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.flash_pieces import Scores
from fluxc.kernels.row_plan import Segment, dense_rows, plan_rows
from fluxc.kernels.rows import attend

# fp64 is there for gradient checks.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class RowOptions:
    """What rows see. kind "streaming": the streaming set of (sink, window), window 0 meaning all keys; "triangle":
    also the dense rows of `last` and `decode_full`."""

    scale: float
    softcap: float = 0.0
    kind: str = "streaming"
    sink: int = 0
    window: int = 0
    last: int = 0
    decode_full: bool = False

    @property
    def scores(self) -> Scores:
        return Scores(self.scale, self.softcap)


@dataclass(frozen=True)
class RowCall:
    """q [B,H,S,D], k [B,Hk,T,D], v [B,Hk,T,Dv]; route bool[B] (True: all keys), prompt_lens and q_start i64[B]."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: RowOptions
    route: Tensor | None = None
    prompt_lens: Tensor | None = None
    q_start: Tensor | None = None
    sink_logits: Tensor | None = None

    def plans(self) -> list[list[Segment]]:
        """Row segments of each request; reads route, prompt_lens and q_start on the host."""
        batch = self.q.shape[0]
        begins = [0] * batch if self.q_start is None else self.q_start.tolist()
        full = [False] * batch if self.route is None else self.route.tolist()
        prompts = [0] * batch if self.prompt_lens is None else self.prompt_lens.tolist()
        return [self._plan(*request) for request in zip(begins, full, prompts, strict=True)]

    def _plan(self, begin: int, full: bool, prompt: int) -> list[Segment]:
        opt, end, dense = self.options, begin + self.q.shape[2], None
        if opt.kind == "triangle":
            dense = dense_rows(prompt, end, last=opt.last, decode_full=opt.decode_full)
        return plan_rows(begin, end, sink=opt.sink, window=0 if full else opt.window, dense=dense)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [B,S,H,Dv] and log-sum-exp [B,H,S] by flash pieces."""
        return attend(self.q, self.k, self.v, self.plans(), self.options.scores, self.sink_logits)


def check(op: str, call: RowCall) -> None:
    """Raise UserError, naming the op, the argument and the limit, if the call breaks the schema's rules.

    The values of q_start and prompt_lens are read on the CPU only: on a device that would stall it.
    """
    if wrong := problem(op, call):
        raise UserError(f"fluxc::{op}: {wrong}")


def problem(op: str, call: RowCall) -> str | None:
    """What breaks the schema's rules, naming the argument and the limit, or None."""
    return _tensor_problem(call) or _shape_problem(call) or _option_problem(op, call) or _request_problem(call)


def _tensor_problem(call: RowCall) -> str | None:
    q = call.q
    for name, x in (("q", q), ("k", call.k), ("v", call.v)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} axes, not 4"
        if x.dtype != q.dtype or x.device != q.device:
            return f"{name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}"
        if x.numel() == 0:
            return f"{name} is empty: {tuple(x.shape)}"
    return None if q.dtype in DTYPES else f"q is {q.dtype}, must be one of {', '.join(map(str, DTYPES))}"


def _shape_problem(call: RowCall) -> str | None:
    (batch, heads, rows, depth), k, v = call.q.shape, call.k.shape, call.v.shape
    if k[0] != batch:
        return f"k has batch {k[0]}, q has {batch}"
    if k[3] != depth:
        return f"k has width {k[3]}, q has {depth}"
    if heads % k[1]:
        return f"q has {heads} heads, no multiple of k's {k[1]}"
    if k[2] < rows:
        return f"k has {k[2]} keys for {rows} queries"
    return None if v[:3] == k[:3] else f"v is {tuple(v)}, k is {tuple(k)}: only their widths may differ"


def _option_problem(op: str, call: RowCall) -> str | None:
    options = call.options
    for name in ("sink", "window", "last", "softcap"):
        if getattr(options, name) < 0:
            return f"{name} is {getattr(options, name)}, must not be negative"
    return None if options.window or op == "attention" else "window is 0, must be at least 1"


def _request_problem(call: RowCall) -> str | None:
    batch, heads = call.q.shape[:2]
    for name, length in (("route", batch), ("prompt_lens", batch), ("q_start", batch), ("sink_logits", heads)):
        x = getattr(call, name)
        if x is None:
            continue
        if x.shape != (length,):
            return f"{name} must be [{length}], is {tuple(x.shape)}"
        if name != "sink_logits" and x.dtype != (torch.bool if name == "route" else torch.int64):
            return f"{name} must be {'bool' if name == 'route' else 'int64'}, is {x.dtype}"
    return _range_problem(call)


def _range_problem(call: RowCall) -> str | None:
    rows, keys = call.q.shape[2], call.k.shape[2]
    if call.q.is_cuda:
        return None
    if call.q_start is not None:
        low, high = int(call.q_start.min()), int(call.q_start.max())
        if low < 0 or high + rows > keys:
            return f"q_start must lie in 0..{keys - rows} for {rows} of {keys} keys, found {low}..{high}"
    if call.options.kind == "triangle" and call.prompt_lens is not None:
        low, high = int(call.prompt_lens.min()), int(call.prompt_lens.max())
        if low < 0 or high > rows:
            return f"prompt_lens must lie in 0..{rows}, found {low}..{high}"
    return None
