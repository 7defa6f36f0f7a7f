"""Small plans and an exact model behind the `Programs` protocol, for tests of the engine. Only tests import this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.shapes import LayerShape
from fluxc.model_info import AttentionInfo, ModelInfo
from fluxc.passes.rope_per_request import rope_limit
from fluxc.plan import CurvePoint, LayerPlan, Plan
from fluxc.runtime.model import FluxModel

HEADS = 2
KV_HEADS = 1
HEAD_DIM = 4
CONTEXT = 512
TIE = 1e-3
"""Logits that are closer than this may change places in fp32 (DESIGN section 7)."""
Ring = tuple[int, int]


def toy_plan(
    rings: Sequence[Ring | int],
    decode: Literal["sparse", "full"] = "sparse",
    context: int = CONTEXT,
    **changes: Any,
) -> Plan:
    """A plan with one attention an item: (sink, window) of a routable one, or an int, a window of its own."""
    windows = [0 if isinstance(ring, tuple) else ring for ring in rings]
    attentions = tuple(
        AttentionInfo(i, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, window) for i, window in enumerate(windows)
    )
    info = ModelInfo("toy", context, "float32", "ab" * 32, attentions)
    layers = tuple(LayerPlan(i, "streaming", *ring) for i, ring in enumerate(rings) if isinstance(ring, tuple))
    curve = tuple(CurvePoint(at, (bias,) * len(layers)) for at, bias in ((0.01, -20.0), (0.99, 20.0)))
    values: dict[str, Any] = {"budget": 0.5, **changes}
    return Plan(info, 4, decode, layers, curve, **values)


def shapes_of(plan: Plan) -> tuple[LayerShape, ...]:
    """The layers a program of the plan's model says it has."""
    rows = {layer.layer: row for row, layer in enumerate(plan.layers)}
    return tuple(
        LayerShape(a.layer, a.routable, rows.get(a.layer), a.kv_heads, a.key_dim, a.window)
        for a in plan.model.attentions
    )


def transformers_tokens(source: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The greedy answer of a transformers model.

    Where RoPE depends on the length it computes each token anew: transformers up to 5.17 errs in the first step after
    it gave up its cache of a text that had become too long for it.
    """
    if getattr(source.config, "original_max_position_embeddings", None):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(count):
                tokens.append(int(source(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        return tokens[len(prompt) :]
    options = {"do_sample": False, "pad_token_id": 0, **options}
    out = source.generate(torch.tensor([prompt]), max_new_tokens=count, **options)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def assert_recomputed(
    model: FluxModel, tokens: Sequence[int], prompt: int, routes: Sequence[bool], answered: int
) -> None:
    """The last `answered` of `tokens` are the greedy ones by full recomputation; the first `prompt` chose the routes.

    Where the two largest logits are closer than TIE, either will do. A text that outgrows the original context
    (longrope) is computed twice, since what was answered before was rotated otherwise.
    """
    first, limit = len(tokens) - answered, rope_limit(model.routed_program)
    for end in sorted({len(tokens), min(max(limit + 1, first), len(tokens))} - {first}):
        rows = torch.arange(first - 1, end - 1)
        options: dict[str, Any] = {"routes": routes, "program": "routed", "logits_at": rows[None]}
        again = model.prefill([list(tokens[: end - 1])], prompt_lens=[prompt], **options)
        best = again.logits[0].topk(2)
        ties = best.values[:, 0] - best.values[:, 1] < TIE
        found = torch.tensor(tokens[first:end])
        assert bool(((found == best.indices[:, 0]) | ties & (found == best.indices[:, 1])).all())
        first = end


class ToyPrograms:
    """A tiny decoder in plain torch, float64, behind the `Programs` protocol: every mask is written out.

    `logits` computes whole texts under any routes: what prefill, decode and append have to agree with.
    """

    vocabulary = 61
    dtype = torch.float64
    rope_limit = 0

    def __init__(self, plan: Plan, seed: int = 0, rope_limit: int = 0) -> None:
        self.plan, self.layers, self.context = plan, shapes_of(plan), plan.model.context
        self.device = torch.device("cpu")
        self.rope_limit = rope_limit
        generator = torch.Generator().manual_seed(seed)
        wide, narrow = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

        def weight(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, dtype=self.dtype) * 0.9

        self.embed = weight(self.vocabulary, wide)
        self.head = weight(wide, self.vocabulary)
        self.weights = [
            {"q": weight(wide, wide), "k": weight(wide, narrow), "v": weight(wide, narrow), "router": weight(wide)}
            for _ in self.layers
        ]
        self.calls: list[str] = []

    def logits(self, tokens: Sequence[int], prompt: int, routes: Sequence[bool]) -> Tensor:
        """Logits [S,V] of a whole text by full recomputation, rows after `prompt` as the plan's `decode` says."""
        hidden = self._embedded(torch.tensor([list(tokens)]), torch.arange(len(tokens))[None], len(tokens))
        for shape in self.layers:
            q, k, v = self._qkv(shape, hidden)
            full = shape.row is not None and routes[shape.row]
            hidden = self._mix(hidden, _attend(q, k, v, self._mask(shape, full, len(tokens), prompt)))
        return (hidden @ self.head)[0]

    def prefill(
        self, input_ids: Tensor, prompt_lens: Tensor, route_bias: Tensor, logits_at: Tensor, *, dense: bool = False
    ) -> Iterator[LayerKV | Prefilled]:
        """See Programs."""
        tokens, prompt = input_ids.shape[1], int(prompt_lens)
        self.calls.append("prefill")
        hidden = self._embedded(input_ids, torch.arange(tokens)[None], tokens)
        routes, scores = [], []
        for index, shape in enumerate(self.layers):
            q, k, v = self._qkv(shape, hidden)
            full = False
            if shape.row is not None:
                scores.append((hidden[0, :prompt] @ self.weights[index]["router"]).mean().float())
                full = dense or bool(scores[-1] + route_bias[shape.row, 0] > 0)
                routes.append(full)
            hidden = self._mix(hidden, _attend(q, k, v, self._mask(shape, full, tokens, prompt)))
            yield LayerKV(index, k, v, None if shape.row is None or dense else full)
        last = (hidden @ self.head)[:, logits_at[0]]
        yield Prefilled(last, torch.tensor(routes), None if dense else torch.stack(scores))

    def decode(
        self, cache: Tensor, input_ids: Tensor, position_ids: Tensor, slots: Tensor, page_table: Tensor, lens: Tensor
    ) -> Tensor:
        """See Programs."""
        self.calls.append(f"decode {len(input_ids)}")
        hidden = self._embedded(input_ids, position_ids, position_ids + 1)
        for index, shape in enumerate(self.layers):
            q, k, v = self._qkv(shape, hidden)
            torch.ops.fluxc.kv_write(cache, k, v, slots[index, :, None])
            longest = int(lens[index].max())
            old = [_cached(cache, pages, longest) for pages in page_table[index]]
            unread = torch.arange(longest) >= lens[index, :, None]
            # What lies beyond a request's own slots is anything, NaN included: not even a weight of 0 may touch it.
            old_k, old_v = (torch.cat(x).masked_fill(unread[:, None, :, None], 0) for x in zip(*old, strict=True))
            hidden = self._mix(hidden, _attend(q, old_k, old_v, ~unread[:, None, None]))
        return (hidden @ self.head)[:, 0]

    def append(
        self,
        cache: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        seq_lens: Tensor,
        slots: Tensor,
        page_table: Tensor,
        lens: Tensor,
        start: Tensor,
        sinks: Tensor,
        windows: Tensor,
        logits_at: Tensor,
    ) -> Tensor:
        """See Programs; one request."""
        self.calls.append("append")
        hidden = self._embedded(input_ids, position_ids, start + seq_lens)
        for index, shape in enumerate(self.layers):
            q, k, v = self._qkv(shape, hidden)
            old_k, old_v = _cached(cache, page_table[index, 0], int(lens[index, 0]))
            sink, window = int(sinks[index, 0]), int(windows[index, 0])
            before = _positions(old_k.shape[2], int(start), sink, window)
            keys = torch.cat((before, position_ids[0]))
            mask = _seen(position_ids[0], keys, sink, window)
            out = _attend(q, torch.cat((old_k, k), 2), torch.cat((old_v, v), 2), mask)
            torch.ops.fluxc.kv_write(cache, k, v, slots[index])
            hidden = self._mix(hidden, out)
        return (hidden @ self.head)[:, logits_at[0]]

    def _embedded(self, ids: Tensor, positions: Tensor, length: int | Tensor) -> Tensor:
        """[B,S,C]; texts longer than `rope_limit` turn at another speed, as with longrope."""
        speed = torch.where(torch.as_tensor(length) > self.rope_limit, 0.37, 0.29) if self.rope_limit else 0.37
        angles = (positions * speed)[..., None] * torch.arange(1, 1 + HEADS * HEAD_DIM, dtype=self.dtype)
        return self.embed[ids] + angles.cos()

    def _qkv(self, shape: LayerShape, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.weights[shape.layer]
        q, k, v = ((hidden @ weights[name]).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for name in "qkv")
        return q, k, v

    def _mix(self, hidden: Tensor, out: Tensor) -> Tensor:
        return torch.tanh(hidden + out.transpose(1, 2).flatten(2)) * 1.5

    def _mask(self, shape: LayerShape, full: bool, tokens: int, prompt: int) -> Tensor:
        rows = torch.arange(tokens)
        if shape.row is None:
            return _seen(rows, rows, 0, shape.window)
        layer = self.plan.layers[shape.row]
        dense, sparse = _seen(rows, rows, 0, 0), _seen(rows, rows, layer.sink, layer.window)
        if full:
            return dense
        return torch.where((rows >= prompt)[:, None], dense, sparse) if self.plan.decode == "full" else sparse


def _seen(rows: Tensor, keys: Tensor, sink: int, window: int) -> Tensor:
    """bool[rows,keys] of the streaming set; window 0: all keys before the row."""
    causal = keys <= rows[:, None]
    return causal & ((keys < sink) | (rows[:, None] - keys < window)) if window else causal


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B,H,S,D], k and v [B,1,T,D], mask bool[S,T]: [B,H,S,D]."""
    scores = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def _cached(cache: Tensor, pages: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1,Hk,slots,D] of one layer and request."""
    k, v = (cache[pages.long(), side].transpose(0, 1).flatten(1, 2)[None, :, :slots] for side in (0, 1))
    return k, v


def _positions(slots: int, start: int, sink: int, window: int) -> Tensor:
    """The token in each slot of a layer that has seen `start` tokens."""
    held = {}
    for token in range(start):
        held[token if not window or token < sink else sink + (token - sink) % window] = token
    return torch.tensor([held[slot] for slot in range(slots)], dtype=torch.int64)
