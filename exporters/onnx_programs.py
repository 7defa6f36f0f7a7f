"""An ONNX engine behind `fluxc.load`: its programs over the engine's paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fluxc import kernels
from fluxc.engine.geometry import lens_of, pages_of, slots_of
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.shapes import LayerShape
from fluxc.exporters.engine_dir import EngineDir
from fluxc.exporters.onnx_phases import OnnxPhases
from fluxc.exporters.onnx_sessions import OnnxSessions
from fluxc.kernels.schemas import PAGE


class OnnxPrograms:
    """`Programs` of an ONNX engine directory, on the CPU.

    The decode program has one cache a layer and request, the engine pages for all: each step copies the pages of its
    requests. A prefill runs as a whole, so all its layers come at once. A further turn runs token by token.
    """

    def __init__(self, engine: EngineDir) -> None:
        kernels.register()
        found = engine.manifest
        self.layers = tuple(LayerShape(**layer) for layer in found.layers)
        self.vocabulary, self.context, self.rope_limit = found.vocabulary, found.context, found.rope_limit
        self.dtype: torch.dtype = getattr(torch, found.dtype)
        self.device = torch.device("cpu")
        files = {phase: program["file"] for phase, program in found.programs.items()}
        self._phases = OnnxPhases(OnnxSessions(engine.path, files, torch.get_num_threads()))

    def prefill(
        self, input_ids: Tensor, prompt_lens: Tensor, route_bias: Tensor, logits_at: Tensor, *, dense: bool = False
    ) -> Iterator[LayerKV | Prefilled]:
        """See `Programs.prefill`. `dense` forces every route to full; the routers run, and are not asked."""
        bias = torch.full_like(route_bias, torch.inf) if dense else route_bias
        found = self._phases.prefill(input_ids, bias, logits_at, prompt_lens)
        routes, scores = found["routes"][:, 0], found["scores"][:, 0]
        for index, shape in enumerate(self.layers):
            route = None if shape.row is None else bool(routes[shape.row])
            yield LayerKV(index, found.pop(f"k_{index}"), found.pop(f"v_{index}"), route)
        yield Prefilled(found["logits"], routes, None if dense else scores)

    def decode(
        self, cache: Tensor, input_ids: Tensor, position_ids: Tensor, slots: Tensor, page_table: Tensor, lens: Tensor
    ) -> Tensor:
        """See `Programs.decode`."""
        own = _logical(slots, page_table, lens)
        copies = self._copies(cache, page_table, lens, lens)
        logits = self._step(copies, input_ids, position_ids, own, lens)
        self._write_back(cache, copies, own[..., None], slots[..., None])
        return logits

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
        """See `Programs.append`. A request whose turn is over writes its padding nowhere."""
        whole = lens_of((start + seq_lens)[None], sinks, windows)
        copies = self._copies(cache, page_table, whole, lens)
        rows = []
        for at in range(input_ids.shape[1]):
            position = torch.minimum(start + at, start + seq_lens - 1)
            own = slots_of(position[None], sinks, windows).masked_fill((at >= seq_lens)[None], -1)
            held = lens_of(position[None] + 1, sinks, windows)
            rows.append(self._step(copies, input_ids[:, at, None], position[:, None], own, held))
        turn = start[:, None] + torch.arange(input_ids.shape[1])
        self._write_back(cache, copies, slots_of(turn[None], sinks[..., None], windows[..., None]), slots)
        index = logits_at[..., None].expand(-1, -1, self.vocabulary)
        return torch.stack(rows, 1).gather(1, index)

    def _step(
        self, copies: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor, own: Tensor, lens: Tensor
    ) -> Tensor:
        """One token of each request; own -1 writes to the last slot, which no request reads."""
        sizes = torch.tensor([copies[f"k_cache_{index}"].shape[2] for index in range(len(self.layers))])
        slots = torch.where(own < 0, sizes[:, None] - 1, own)
        return self._phases.decode(copies, input_ids, position_ids, slots, lens.to(torch.int32))

    def _copies(self, cache: Tensor, page_table: Tensor, room: Tensor, lens: Tensor) -> dict[str, Tensor]:
        """[B,Hk,C,D] for each layer with `room` i[A,B] slots and a spare one; zero from lens i[A,B] on."""
        copies = {}
        for index in range(len(self.layers)):
            pages = page_table[index, :, : int(pages_of(room[index].max().long()))].long().clamp(0, len(cache) - 1)
            slots = torch.arange(pages.shape[1] * PAGE)
            beyond = (slots >= lens[index, :, None])[:, None, :, None]
            for half, name in enumerate("kv"):
                rows = cache[pages, half].transpose(1, 2).flatten(2, 3).masked_fill_(beyond, 0)
                copies[f"{name}_cache_{index}"] = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        return copies

    def _write_back(self, cache: Tensor, copies: dict[str, Tensor], own: Tensor, slots: Tensor) -> None:
        """Rows own i64[A,B,S] of the copies to slots i64[A,B,S] of the cache; slots of -1 are dropped."""
        for index, shape in enumerate(self.layers):
            at = own[index].clamp(min=0)[:, None, :, None].expand(-1, shape.kv_heads, -1, shape.head_dim)
            k, v = (copies[f"{name}_cache_{index}"].gather(2, at) for name in "kv")
            torch.ops.fluxc.kv_write(cache, k, v, slots[index])


def _logical(slots: Tensor, page_table: Tensor, lens: Tensor) -> Tensor:
    """Slots i64[A,B] of the pool, counted within each request's own pages; -1 stays -1."""
    numbers = torch.arange(page_table.shape[2])
    known = numbers < pages_of(lens.long())[..., None]
    match = (page_table == (slots // PAGE)[..., None]) & known
    return torch.where(slots < 0, slots, match.int().argmax(-1) * PAGE + slots % PAGE)
