"""A hand-written decoder like those people export: its attention and positions are given as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

VOCAB, HIDDEN, HEADS, KV_HEADS, WIDTH = 50, 32, 4, 2, 8
Attend = Callable[[Any, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class ForeignDecoder(torch.nn.Module):
    """Embedding, attention layers with a residual, and a head.

    `attend(layer, q, k, v, padding)` takes q [B,H,S,D], k and v [B,Hk,S,D] and the padding mask [B,S] (None unless it
    is given), and returns [B,S,H*D]. `place(model, hidden, input_ids, padding)` adds positions to hidden [B,S,C], or
    returns it as it is. `rotate(model, x, padding)` turns q and k.
    """

    def __init__(
        self,
        attend: Attend,
        *,
        layers: int = 1,
        place: Callable[..., Tensor] | None = None,
        rotate: Callable[..., Tensor] | None = None,
        buffers: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, HIDDEN)
        self.learned = torch.nn.Embedding(64, HIDDEN)
        self.layers = torch.nn.ModuleList(_Layer(attend) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        self.place, self.rotate = place, rotate
        for name, tensor in (buffers or {}).items():
            self.register_buffer(name, tensor)
            for layer in self.layers:
                layer.register_buffer(name, tensor)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B,S,V]."""
        hidden = self.embed(input_ids)
        if self.place is not None:
            hidden = self.place(self, hidden, input_ids, attention_mask)
        for layer in self.layers:
            hidden = hidden + layer(self, hidden, attention_mask)
        return self.head(self.norm(hidden))


class _Layer(torch.nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.q = torch.nn.Linear(HIDDEN, HEADS * WIDTH)
        self.k, self.v = (torch.nn.Linear(HIDDEN, KV_HEADS * WIDTH) for _ in range(2))
        self.out = torch.nn.Linear(HEADS * WIDTH, HIDDEN)
        self.attend = attend

    def forward(self, model: ForeignDecoder, hidden: Tensor, padding: Tensor | None) -> Tensor:
        B, S, _ = hidden.shape
        q, k, v = (proj(hidden).view(B, S, -1, WIDTH).transpose(1, 2) for proj in (self.q, self.k, self.v))
        if model.rotate is not None:
            q, k = model.rotate(model, q, padding), model.rotate(model, k, padding)
        return self.out(self.attend(self, q, k, v, padding))


def foreign_module(attend: Attend, **options: Any) -> ForeignDecoder:
    """A seeded decoder; see ForeignDecoder for the options."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ForeignDecoder(attend, **options).eval()


def foreign_program(
    module: torch.nn.Module, *, padding: bool = False, smallest: int = 1, longest: int | None = None
) -> ExportedProgram:
    """The module exported with input_ids [B,S] and, with `padding`, attention_mask.

    Batch and length are free from `smallest` (see `export_from`), the length up to `longest`.
    """
    tokens = torch.zeros(2, 12, dtype=torch.long)
    inputs = (tokens, torch.ones_like(tokens)) if padding else (tokens,)

    def export(least: int | None) -> ExportedProgram:
        sizes = {0: free("B", least), 1: free("S", least, longest)}
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=(sizes,) * len(inputs), strict=False)

    return export_from(smallest, export)


def export_from(smallest: int, export: Callable[[int | None], ExportedProgram]) -> ExportedProgram:
    """`export(smallest)`, or what a torch before 2.13 can do: `export(2)`, and `export(None)` for `Dim.DYNAMIC`.

    It tells a length of 1 apart in SDPA, and cannot prove of a named size that 8*S is less than 16*S.
    """
    for least in (smallest, 2):
        try:
            return export(least)
        except Exception:
            if _version() >= (2, 13):
                raise
    return export(None)


def free(name: str, least: int | None, longest: int | None = None) -> Any:
    """A free size for `dynamic_shapes`, from `least`; None lets the exporter find its bounds."""
    return Dim.DYNAMIC if least is None else Dim(name, min=least, max=longest)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def causal_attend(layer: Any, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    """Causal SDPA over grouped heads: the plainest attention of all."""
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)
