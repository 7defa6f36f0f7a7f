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
    """Raise UserError, naming the op, the argument and the limit, if the call breaks the schema's rules."""
    q, k, v, opt = call.q, call.k, call.v, call.options
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.dim() == 4, op, name, f"has {x.dim()} axes, not 4")
        _require(x.dtype == q.dtype, op, name, f"is {x.dtype} but q is {q.dtype}")
        _require(x.device == q.device, op, name, f"is on {x.device} but q is on {q.device}")
        _require(x.numel() > 0, op, name, f"is empty: {tuple(x.shape)}")
    _require(q.dtype in DTYPES, op, "q", f"is {q.dtype}, must be one of {', '.join(map(str, DTYPES))}")
    _require(k.shape[0] == v.shape[0] == q.shape[0], op, "k, v", f"have another batch than q's {q.shape[0]}")
    _require(k.shape[:3] == v.shape[:3], op, "v", f"is {tuple(v.shape)}, k is {tuple(k.shape)}")
    _require(k.shape[3] == q.shape[3], op, "k", f"has width {k.shape[3]}, q has {q.shape[3]}")
    _require(q.shape[1] % k.shape[1] == 0, op, "q", f"has {q.shape[1]} heads, no multiple of k's {k.shape[1]}")
    _require(k.shape[2] >= q.shape[2], op, "k", f"has {k.shape[2]} keys for {q.shape[2]} queries")
    for name in ("sink", "window", "last"):
        _require(getattr(opt, name) >= 0, op, name, f"is {getattr(opt, name)}, must not be negative")
    _require(op == "attention" or opt.window > 0, op, "window", "is 0, must be at least 1")
    _require(opt.softcap >= 0, op, "softcap", f"is {opt.softcap}, must not be negative")
    _check_per_request(op, call)


def _check_per_request(op: str, call: RowCall) -> None:
    batch, heads, rows, keys = call.q.shape[0], call.q.shape[1], call.q.shape[2], call.k.shape[2]
    for name in ("route", "prompt_lens", "q_start"):
        x = getattr(call, name)
        _require(x is None or x.shape == (batch,), op, name, f"must be [{batch}], is {_shape(x)}")
    _require(call.route is None or call.route.dtype == torch.bool, op, "route", "must be bool")
    for name in ("prompt_lens", "q_start"):
        x = getattr(call, name)
        _require(x is None or not (x.is_floating_point() or x.dtype == torch.bool), op, name, "must be integer")
    if call.options.kind == "triangle" and call.prompt_lens is not None:
        low, high = int(call.prompt_lens.min()), int(call.prompt_lens.max())
        _require(low >= 0 and high <= rows, op, "prompt_lens", f"must lie in 0..{rows}, found {low}..{high}")
    sink = call.sink_logits
    _require(sink is None or sink.shape == (heads,), op, "sink_logits", f"must be [{heads}], is {_shape(sink)}")
    if call.q_start is not None:
        low, high = int(call.q_start.min()), int(call.q_start.max())
        _require(low >= 0, op, "q_start", f"is {low}, must not be negative")
        _require(high + rows <= keys, op, "q_start", f"{high} + {rows} queries pass the last of {keys} keys")


def _shape(x: Tensor | None) -> tuple[int, ...]:
    return () if x is None else tuple(x.shape)


def _require(holds: bool, op: str, argument: str, reason: str) -> None:
    if not holds:
        raise UserError(f"fluxc::{op}: {argument} {reason}")
