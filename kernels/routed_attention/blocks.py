"""The kinds `block` of `fluxc::routed_attention`, sparse and full: scored blocks for the prompt, all keys after it.

A prompt's blocks are scored from its own queries and keys, so that they are the same with or without an answer behind
it. Rows after the prompt see all keys, as they do where a layer keeps its whole cache: as the sparse kind it needs
`decode_full`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fluxc.kernels import autograd
from fluxc.kernels.attention import op as attention
from fluxc.kernels.block_attention import op as block_attention
from fluxc.kernels.block_attention.gradient import block_gradient
from fluxc.kernels.block_scores import op as block_scores
from fluxc.kernels.explicit import sum_dtype
from fluxc.kernels.flash_pieces import Scores
from fluxc.kernels.row_call import RowOptions, check
from fluxc.kernels.schemas import NAMESPACE

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor route, Tensor prompt_lens, Tensor? sink_logits"
_NUMBERS = "float scale, float softcap, int block, int stride, float threshold"
FORWARD = f"({_TENSORS}, *, {_NUMBERS}) -> Tensor"
BACKWARD = f"(Tensor grad, {_TENSORS}, *, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)"


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """How scores are formed, and how blocks are chosen (block_scores)."""

    scale: float
    softcap: float
    block: int
    stride: int
    threshold: float

    @property
    def dense(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap}

    def lists(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The key blocks of each block of queries of a prompt."""
        sizes = {"block": self.block, "stride": self.stride, "threshold": self.threshold}
        return block_scores.run(q, k, scale=self.scale, layer=0, **sizes)


def define() -> None:
    """Define the internal ops that a gradient through the kind needs: opaque to tracing, like `rows_forward`."""
    forward = torch.library.custom_op(f"{NAMESPACE}::routed_blocks", _forward, mutates_args=(), schema=FORWARD)
    forward.register_fake(_forward_fake)
    forward.register_autograd(_autograd_backward, setup_context=_setup_context)
    backward = torch.library.custom_op(
        f"{NAMESPACE}::routed_blocks_backward", _backward, mutates_args=(), schema=BACKWARD
    )
    backward.register_fake(_backward_fake)


def attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_lens: Tensor, sink_logits: Tensor | None, options: BlockOptions
) -> Tensor:
    """Output [B,S,H,Dv] of sparse requests; reads prompt_lens on the host."""
    B, H, S, _ = q.shape
    out = q.new_empty(B, S, H, v.shape[-1])
    for b, n in enumerate(prompt_lens.tolist()):
        one = slice(b, b + 1)
        if n:
            prompt = [x[one, :, :n] for x in (q, k, v)]
            lists = options.lists(*prompt[:2])
            how: dict[str, Any] = {**options.dense, "layer": 0, "block": options.block, "sink_logits": sink_logits}
            out[one, :n] = block_attention.run(*prompt, *lists, **how)
        if n < S:
            start = torch.full((1,), n, dtype=torch.int64, device=q.device)
            dense: dict[str, Any] = {**options.dense, "layer": 0, "sink_logits": sink_logits, "q_start": start}
            out[one, n:] = attention.run(q[one, :, n:], k[one], v[one], **dense)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, route: Tensor, prompt_lens: Tensor, sink_logits: Tensor | None, **numbers: Any
) -> Tensor:
    from fluxc.kernels.routed_attention import op

    sizes: dict[str, Any] = {"kind": "block", "sink": 0, "window": 1, "last": 0, "decode_full": True, "layer": 0}
    args, options = (q, k, v, route, prompt_lens), {"sink_logits": sink_logits, **sizes, **numbers}
    check("routed_attention", op.row_call(*args, **options))
    return op.run(*args, **options)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *requests: Any, **numbers: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    prompt_lens: Tensor,
    sink_logits: Tensor | None,
    **numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options, kind = BlockOptions(**numbers), sum_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=kind, device=x.device) for x in (q, k, v))
    sinks = torch.zeros(0 if sink_logits is None else q.shape[1], dtype=kind, device=q.device)
    for b, (full, n) in enumerate(zip(route.tolist(), prompt_lens.tolist(), strict=True)):
        request = (grad[b], q[b], k[b], v[b])
        for rows, keys, found in _shares(request, 0 if full else n, sink_logits, options):
            dq[b, :, rows] += found[0]
            dk[b, :, keys] += found[1]
            dv[b, :, keys] += found[2]
            sinks += found[3]
    like = q.new_empty(0) if sink_logits is None else sink_logits
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), sinks.to(like.dtype)


def _shares(
    request: tuple[Tensor, ...], n: int, sink_logits: Tensor | None, options: BlockOptions
) -> Iterator[tuple[slice, slice, tuple[Tensor, ...]]]:
    """Rows, keys and gradients of the two parts of a request: its first n rows by blocks, the rest over all keys."""
    grad, q, k, v = request
    if n:
        index, count = options.lists(q[None, :, :n], k[None, :, :n])
        how = Scores(options.scale, options.softcap)
        b_q, b_k, b_v = (x[:, :n] for x in (q, k, v))
        found = block_gradient(grad[:n], b_q, b_k, b_v, index[0], count[0], how, options.block, sink_logits)
        yield slice(0, n), slice(0, n), found
    if n < q.shape[1]:
        start = torch.full((1,), n, dtype=torch.int64, device=q.device) if n else None
        rest = (q[None, :, n:], k[None], v[None])
        more: dict[str, Any] = {"op": "attention", **dataclasses.asdict(RowOptions(**options.dense))}
        out, lse = autograd.forward(*rest, None, None, start, sink_logits, **more)
        dense = autograd.backward(grad[None, n:], *rest, out, lse, None, None, start, sink_logits, **more)
        yield slice(n, None), slice(None), tuple(x if x.dim() < 4 else x[0] for x in dense)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    route: Tensor,
    prompt_lens: Tensor,
    sink_logits: Tensor | None,
    **numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sink = q.new_empty(0) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sink


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.numbers = keyword_only_inputs


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, sink = torch.ops.fluxc.routed_blocks_backward(grad, *ctx.saved_tensors, **ctx.numbers)
    return dq, dk, dv, None, None, None if ctx.saved_tensors[-1] is None else sink
