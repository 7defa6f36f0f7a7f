"""`fluxc::decode_attention`: one new token a request over the slots of its paged cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fluxc.kernels import paged
from fluxc.kernels.define import Provider, choose, define_plain, triton_provider
from fluxc.kernels.flash_pieces import Scores
from fluxc.kernels.rows import attend_keys


def define() -> None:
    """Define torch.ops.fluxc.decode_attention."""
    define_plain("decode_attention", run, lambda q, *args, **kwargs: q.new_empty(q.shape))


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    return triton_provider("decode_attention"), Provider("gather", lambda *args, **kwargs: None, _gathered)


def run(
    q: Tensor, cache: Tensor, page_table: Tensor, lens: Tensor, *, sink_logits: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Output [B,H,D] by the first provider that takes the call; raises UserError for arguments that do not fit."""
    if q.dim() == 3:
        paged.check("decode_attention", q, cache, page_table, lens, sink_logits)
    else:
        paged.refuse("decode_attention", f"q must be [B,H,D], is {tuple(q.shape)}")
    kwargs |= {"sink_logits": sink_logits}
    provider = choose("decode_attention", providers(), q, cache, page_table, lens, **kwargs)
    return provider.run(q, cache, page_table, lens, **kwargs)


def _gathered(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lens: Tensor,
    *,
    scale: float,
    layer: int,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """A request at a time, its slots copied side by side; reads lens on the host."""
    out = q.new_zeros(q.shape)
    for b, slots in enumerate(lens.tolist()):
        if slots:
            parts = paged.pieces("decode_attention", cache, page_table[b], slots)
            out[b] = attend_keys(q[b], parts, Scores(scale, softcap), sink_logits)
    return out
