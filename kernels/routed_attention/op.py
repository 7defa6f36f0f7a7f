"""`fluxc::routed_attention`: per request, full attention where its route says so, else the sparse kind.

Exactly one branch runs for each request, and all routes full gives `attention` bit for bit:

1. one kernel that reads the routes on the device, where the same kernel serves `attention`;
2. else the host reads the routes, and requests with the same route are computed by the very op of that route. The kind
   `block` is always computed so, of sparse requests or, as `full_kind`, of full ones: its prompts' lengths decide what
   is scored. With it, all routes full gives what block_attention gives instead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import UserError
from fluxc.kernels.attention import op as attention
from fluxc.kernels.define import Provider, choose, define_attention, triton_provider
from fluxc.kernels.routed_attention import blocks
from fluxc.kernels.routed_attention.blocks import BlockOptions
from fluxc.kernels.row_call import RowCall, RowOptions
from fluxc.kernels.streaming_attention import op as streaming_attention
from fluxc.kernels.triangle_attention import op as triangle_attention

KINDS = ("streaming", "triangle", "block")
FULL_KINDS = ("dense", "block")


def define() -> None:
    """Define torch.ops.fluxc.routed_attention."""
    blocks.define()
    define_attention("routed_attention", row_call, run, Provider("blocks", _not_blocks, _taped_blocks))


def row_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    prompt_lens: Tensor,
    *,
    scale: float,
    layer: int,
    kind: str,
    sink: int,
    window: int,
    last: int,
    decode_full: bool = False,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    block: int = 0,
    stride: int = 0,
    threshold: float = 0.0,
    full_kind: str = "dense",
) -> RowCall:
    """The op's arguments as a RowCall, whose rows mean nothing where they are blocks; UserError for wrong kinds."""
    if kind not in KINDS:
        raise UserError(f"fluxc::routed_attention: kind is {kind!r}", hint=f"Use one of {', '.join(KINDS)}")
    if kind == "block" and not decode_full:
        raise UserError("fluxc::routed_attention: decode_full is False, the kind block needs it")
    if full_kind not in FULL_KINDS:
        raise UserError(
            f"fluxc::routed_attention: full_kind is {full_kind!r}", hint=f"Use one of {', '.join(FULL_KINDS)}"
        )
    if full_kind == kind:
        raise UserError(
            "fluxc::routed_attention: full_kind is 'block', and so is kind: both branches would be the same"
        )
    # Streaming with `decode: full` is triangle without dense prompt rows.
    last = last if kind == "triangle" else 0
    rows = "triangle" if kind == "triangle" or decode_full else "streaming"
    options = RowOptions(scale, softcap, rows, sink, window, last, decode_full)
    return RowCall(q, k, v, options, route, prompt_lens, sink_logits=sink_logits)


def providers() -> tuple[Provider, ...]:
    """In order of preference."""
    by_flag = triton_provider("routed_attention")

    def supported(q: Tensor, k: Tensor, v: Tensor, *requests: Tensor, **kwargs: Any) -> str | None:
        if reason := by_flag.supported(q, k, v, *requests, **kwargs):
            return reason
        shared = {name: kwargs[name] for name in ("scale", "layer", "softcap", "sink_logits") if name in kwargs}
        full = choose("attention", attention.providers(), q, k, v, **shared)
        return None if full.name == by_flag.name else f"{full.name} serves attention, and all routes full must equal it"

    return (
        Provider(by_flag.name, supported, by_flag.run),
        Provider("branches", lambda *args, **kwargs: None, _branches),
    )


def run(*args: Any, **kwargs: Any) -> Tensor:
    """Output [B,S,H,Dv] by the first provider that takes the call."""
    return choose("routed_attention", providers(), *args, **kwargs).run(*args, **kwargs)


def _branches(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, prompt_lens: Tensor, *, scale: float, layer: int, **kwargs: Any
) -> Tensor:
    """Each request by the op of its branch; reads the routes on the host."""
    call = row_call(q, k, v, route, prompt_lens, scale=scale, layer=layer, **kwargs)
    routes, chosen = route.tolist(), _block_options(scale=scale, **kwargs)
    # Which of the two routes, if any, is computed by blocks.
    by_blocks = (kwargs["kind"] == "block", kwargs.get("full_kind") == "block")

    def branch(is_full: bool, rows: slice) -> Tensor:
        return _branch(call, is_full, rows, layer, chosen if by_blocks[is_full] else None)

    if all(routes) or not any(routes):
        return branch(routes[0], slice(None))
    return torch.cat([branch(is_full, slice(b, b + 1)) for b, is_full in enumerate(routes)])


def _branch(call: RowCall, is_full: bool, rows: slice, layer: int, chosen: BlockOptions | None) -> Tensor:
    opt, qkv = call.options, (call.q[rows], call.k[rows], call.v[rows])
    common: dict[str, Any] = {
        "scale": opt.scale,
        "layer": layer,
        "softcap": opt.softcap,
        "sink_logits": call.sink_logits,
    }
    if chosen:
        return blocks.attend(*qkv, call.prompt_lens[rows], call.sink_logits, chosen)  # type: ignore[index]
    if is_full:
        return attention.run(*qkv, **common)
    common |= {"sink": opt.sink, "window": opt.window}
    if opt.kind == "streaming":
        return streaming_attention.run(*qkv, **common)
    assert call.prompt_lens is not None, "the op's schema makes it an argument"
    return triangle_attention.run(*qkv, call.prompt_lens[rows], last=opt.last, decode_full=opt.decode_full, **common)


def _block_options(*, scale: float, softcap: float = 0.0, **kwargs: Any) -> BlockOptions | None:
    if _not_blocks(**kwargs):
        return None
    found = {name: kwargs.get(name, 0) for name in ("block", "stride", "threshold")}
    return BlockOptions(scale, softcap, **found)


def _not_blocks(*args: Any, kind: str, full_kind: str = "dense", **kwargs: Any) -> str | None:
    return None if "block" in (kind, full_kind) else f"the kind {kind} has gradients of its own"


def _taped_blocks(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, prompt_lens: Tensor, *, sink_logits: Tensor | None = None,
    full_kind: str = "dense", **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Full requests by blocks are computed beside sparse ones, and one of the two is taken."""
    chosen = _block_options(full_kind=full_kind, **kwargs)
    assert chosen, "asked only where some request is computed by blocks"
    sizes, none = dataclasses.asdict(chosen), torch.zeros_like(route)
    if kwargs["kind"] == "block":
        return torch.ops.fluxc.routed_blocks(q, k, v, route, prompt_lens, sink_logits, **sizes)
    full = torch.ops.fluxc.routed_blocks(q, k, v, none, prompt_lens, sink_logits, **sizes)
    sparse = torch.ops.fluxc.routed_attention(q, k, v, none, prompt_lens, sink_logits=sink_logits, **kwargs)
    return torch.where(route[:, None, None, None], full, sparse)
