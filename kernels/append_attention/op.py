"""`fluxc::append_attention`: a further turn of several tokens on top of a kept cache, rings and full layers alike.

The cached keys in the order of their positions, followed by the turn's own, are a sequence without gaps but for the
tokens a ring has dropped, which no row sees. Counted in that sequence the turn begins at lens, and its rows see
exactly the streaming set of (sink, window): the turn is streaming attention with an offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fluxc.kernels import paged
from fluxc.kernels.define import Provider, choose, define_plain, triton_provider
from fluxc.kernels.flash_pieces import Scores
from fluxc.kernels.row_plan import plan_rows
from fluxc.kernels.rows import attend


def define() -> None:
    """Define torch.ops.fluxc.append_attention."""
    define_plain("append_attention", run, _fake)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("append_attention"), Provider("gather", lambda *args, **kwargs: None, _gathered)


def run(*args: Any, **kwargs: Any) -> Tensor:
    """Output [B,S,H,D] by the first provider that takes the call; raises UserError for arguments that do not fit."""
    _check(*args, sink_logits=kwargs.get("sink_logits"))
    return choose("append_attention", providers(), *args, **kwargs).run(*args, **kwargs)


def _fake(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lens: Tensor,
    start: Tensor,
    sinks: Tensor,
    windows: Tensor,
    *,
    scale: float,
    layer: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """A request at a time; reads lens, start, sinks and windows on the host."""
    rows = []
    numbers = zip(lens.tolist(), start.tolist(), sinks.tolist(), windows.tolist(), strict=True)
    for b, (slots, begin, sink, window) in enumerate(numbers):
        old = _in_order(paged.gather("append_attention", cache, page_table[b], slots), begin, sink, window)
        keys, values = (torch.cat([past, own[b]], 1)[None] for past, own in zip(old, (k, v), strict=True))
        plan = plan_rows(slots, slots + q.shape[2], sink=sink, window=window)
        rows.append(attend(q[b, None], keys, values, [plan], Scores(scale, softcap), sink_logits)[0])
    return torch.cat(rows)


def _in_order(old: Tensor, start: int, sink: int, window: int) -> Tensor:
    """Cached keys and values [2,Hk,slots,D] in the order of their positions: a wrapped ring is turned back."""
    if window == 0 or start <= sink + window:
        return old
    oldest = sink + (start - sink) % window
    return torch.cat([old[:, :, :sink], old[:, :, oldest:], old[:, :, sink:oldest]], 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lens: Tensor,
    start: Tensor,
    sinks: Tensor,
    windows: Tensor,
    *,
    sink_logits: Tensor | None,
) -> None:
    op = "append_attention"
    if q.dim() != 4:
        paged.refuse(op, f"q must be [B,H,S,D], is {tuple(q.shape)}")
    paged.check(op, q, cache, page_table, lens, sink_logits)
    wanted = (q.shape[0], cache.shape[2], q.shape[2], q.shape[3])
    for name, x in (("k", k), ("v", v)):
        if x.shape != wanted or x.dtype != q.dtype:
            paged.refuse(op, f"{name} must be {wanted} of {q.dtype}, is {tuple(x.shape)} of {x.dtype}")
    for name, x in (("start", start), ("sinks", sinks), ("windows", windows)):
        if x.shape != lens.shape or x.dtype != torch.int64:
            paged.refuse(op, f"{name} must be int64 [{len(lens)}], is {x.dtype} {tuple(x.shape)}")
    if not lens.is_cuda:
        _check_values(lens, start, sinks, windows)


def _check_values(lens: Tensor, start: Tensor, sinks: Tensor, windows: Tensor) -> None:
    for name, x in (("start", start), ("sinks", sinks), ("windows", windows)):
        if int(x.min()) < 0:
            paged.refuse("append_attention", f"{name} must not be negative, found {int(x.min())}")
    if bool(((windows == 0) & (sinks != 0)).any()):
        paged.refuse("append_attention", "sinks must be 0 where windows is 0, a full layer")
    expected = torch.where(windows == 0, start, torch.minimum(start, sinks + windows))
    if not torch.equal(expected, lens.long()):
        found, wanted = lens.tolist(), expected.tolist()
        paged.refuse(
            "append_attention", f"lens must be start, in a ring at most sink + window: is {found}, not {wanted}"
        )
