"""`fluxc::routed_attention` by one Triton kernel that reads each sample's route on the device: no host sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fluxc.kernels.triton_available import unavailable

if TYPE_CHECKING:
    from fluxc.kernels.triton_launch import Call


def _call(route: Tensor, prompt_lens: Tensor, *, scale: float, layer: int, kind: str, sink: int, window: int,
          last: int, decode_full: bool = False, softcap: float = 0.0,
          sink_logits: Tensor | None = None, block: int = 0, stride: int = 0,
          threshold: float = 0.0, full_kind: str = "dense") -> Call:  # fmt: skip
    from fluxc.kernels.triton_launch import Call

    # Streaming with `decode: full` is triangle without dense prompt rows.
    last = last if kind == "triangle" else 0
    lens = prompt_lens if last or decode_full else None
    return Call(scale, sink, window, last, decode_full, lens, route, softcap, sink_logits)


def supported(q: Tensor, k: Tensor, v: Tensor, route: Tensor, prompt_lens: Tensor, **options: Any) -> str | None:
    """Why this call (the op's own arguments) is not served, or None."""
    if options["kind"] not in ("streaming", "triangle"):
        return f"kind {options['kind']} has no kernel that reads the route"
    if options.get("full_kind") == "block":
        return "full kind block has no kernel that reads the route"
    if reason := unavailable(q):
        return reason
    from fluxc.kernels import triton_launch

    return triton_launch.unsupported(q, k, v, _call(route, prompt_lens, **options))


def forward(q: Tensor, k: Tensor, v: Tensor, route: Tensor, prompt_lens: Tensor, **options: Any) -> Tensor:
    """The op's output [B,S,H,Dv]; the call must be supported."""
    from fluxc.kernels import triton_launch

    return triton_launch.attend(q, k, v, _call(route, prompt_lens, **options))
