"""A hand-written decoder whose programs do not change with transformers: for golden files and tests of passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from fluxc import kernels


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Sizes of the toy decoder. `rope`: half, interleaved, partial, split, transposed, scaled, two-sources or none.

    `windows`: the window of each layer's attention, 0 for none; its length is the number of layers.
    """

    windows: tuple[int, ...] = (0, 0)
    hidden: int = 16
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    vocab: int = 32
    rope: str = "half"
    qk_norm: bool = False
    softcap: float = 0.0


def toy_module(config: ToyConfig | None = None, seed: int = 0) -> torch.nn.Module:
    """The toy decoder with seeded weights; forward takes the inputs of a captured program."""
    torch.manual_seed(seed)
    return ToyDecoder(config or ToyConfig()).eval()


def toy_program(config: ToyConfig | None = None, seed: int = 0) -> torch.export.ExportedProgram:
    """The toy decoder as a captured program: batch, length and logits rows symbolic."""
    kernels.register()
    batch, length, rows = torch.export.Dim("B", min=1), torch.export.Dim("S", min=1), torch.export.Dim("N", min=1)
    dims = ({0: batch, 1: length}, {0: batch, 1: length}, {0: batch}, {0: batch, 1: rows})
    with torch.no_grad():
        return torch.export.export(toy_module(config, seed), toy_inputs(), dynamic_shapes=dims)


def toy_inputs(batch: int = 2, length: int = 24, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of the toy program: input_ids, position_ids, seq_lens, logits_at. Rows get shorter by 5 tokens each."""
    generator = torch.Generator().manual_seed(seed)
    seq_lens = torch.tensor([max(1, length - 5 * row) for row in range(batch)])
    return (
        torch.randint(0, 32, (batch, length), generator=generator),
        torch.arange(length).repeat(batch, 1),
        seq_lens,
        torch.stack([seq_lens - 1, seq_lens // 2, seq_lens * 0], dim=1),
    )


def toy_routed_inputs(layers: int, bias: float | Tensor, batch: int = 2, length: int = 24) -> tuple[Tensor, ...]:
    """Inputs of the routed toy program; `bias` fills route_bias [layers,batch], or is one value a layer."""
    input_ids, position_ids, seq_lens, logits_at = toy_inputs(batch, length)
    per_layer = torch.as_tensor(bias, dtype=torch.float32).reshape(-1, 1)
    route_bias = per_layer.expand(layers, batch).contiguous()
    return input_ids, position_ids, seq_lens, (seq_lens - 2).clamp(min=1), route_bias, logits_at


class ToyDecoder(torch.nn.Module):
    """Embedding, decoder layers, norm and head."""

    inv_freq: Tensor

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(config.vocab, config.hidden)
        self.layers = torch.nn.ModuleList(ToyLayer(config, index) for index in range(len(config.windows)))
        self.norm = torch.nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = torch.nn.Linear(config.hidden, config.vocab, bias=False)
        width = {"partial": config.head_dim // 2}.get(config.rope, config.head_dim)
        self.register_buffer("inv_freq", 100.0 ** -(torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, seq_lens: Tensor, logits_at: Tensor) -> Tensor:
        """Logits [B,N,V] of the rows `logits_at`."""
        hidden = self.embed(input_ids)
        angles = position_ids.unsqueeze(-1) * self.inv_freq
        table = (angles.cos().unsqueeze(1), angles.sin().unsqueeze(1))
        for layer in self.layers:
            hidden = layer(hidden, *table)
        rows = logits_at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.head(self.norm(hidden.gather(1, rows)))


class ToyLayer(torch.nn.Module):
    """Pre-norm attention and a SwiGLU MLP, each with a residual."""

    def __init__(self, config: ToyConfig, index: int) -> None:
        super().__init__()
        self.attn = ToyAttention(config, index)
        self.norm_1, self.norm_2 = (torch.nn.RMSNorm(config.hidden, eps=1e-6) for _ in range(2))
        self.gate, self.up = (torch.nn.Linear(config.hidden, 2 * config.hidden, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(2 * config.hidden, config.hidden, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [B,S,hidden]; cos, sin [B,1,S,half]."""
        hidden = hidden + self.attn(self.norm_1(hidden), cos, sin)
        inner = self.norm_2(hidden)
        return hidden + self.down(torch.nn.functional.silu(self.gate(inner)) * self.up(inner))


class ToyAttention(torch.nn.Module):
    """Grouped-query attention with the configured rotation."""

    def __init__(self, config: ToyConfig, index: int) -> None:
        super().__init__()
        self.config, self.index, width = config, index, config.head_dim
        sizes = (config.heads * width, config.kv_heads * width, config.kv_heads * width)
        self.q, self.k, self.v = (torch.nn.Linear(config.hidden, size, bias=False) for size in sizes)
        self.o = torch.nn.Linear(config.heads * width, config.hidden, bias=False)
        self.q_norm = torch.nn.RMSNorm(width, eps=1e-6) if config.qk_norm else torch.nn.Identity()
        self.q_other = torch.nn.Linear(config.hidden, sizes[0], bias=False) if config.rope == "two-sources" else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B,S,hidden] -> [B,S,hidden]."""
        config = self.config
        q, k, v = (_heads(proj(x), config.head_dim) for proj in (self.q, self.k, self.v))
        q = self.q_norm(q)
        if self.q_other is not None:
            q = q * cos.repeat(1, 1, 1, 2) + _heads(self.q_other(x), config.head_dim) * sin.repeat(1, 1, 1, 2)
        rotate = toy_rope(config.rope)
        out = torch.ops.fluxc.attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            scale=config.head_dim**-0.5,
            layer=self.index,
            window=config.windows[self.index],
            softcap=config.softcap,
        )
        return self.o(out.flatten(2))


def toy_rope(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The rotation `kind` of ToyConfig.rope: x [B,H,S,D], cos and sin [B,1,S,half] -> [B,H,S,D]."""
    if kind not in TOY_ROPES:
        return lambda x, cos, sin: x
    return TOY_ROPES[kind]


def _heads(x: Tensor, width: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], -1, width).transpose(1, 2)


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), -1) * sin


def _rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def _rotate_partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = 2 * cos.shape[-1]
    return torch.cat((_rotate_half(x[..., :width], cos, sin), x[..., width:]), -1)


def _rotate_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _rotate_transposed(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The axes stand [B,S,H,D] while it rotates, as in models that transpose last."""
    rotated = _rotate_half(x.transpose(1, 2).contiguous(), cos.transpose(1, 2), sin.transpose(1, 2))
    return rotated.transpose(1, 2)


def _rotate_scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate_half(x.float(), cos * 1.25, sin * 1.25).type_as(x) * 0.5


TOY_ROPES = {
    "half": _rotate_half,
    "interleaved": _rotate_interleaved,
    "partial": _rotate_partial,
    "split": _rotate_split,
    "transposed": _rotate_transposed,
    "scaled": _rotate_scaled,
}
