"""An ONNX engine behind `fluxc.load`: its programs, and the paged cache they are run over. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fluxc.engine.geometry import lens_of, pages_of, slots_of
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.shapes import LayerShape
from fluxc.exporters.engine_dir import EngineDir
from fluxc.exporters.onnx_sessions import OnnxSessions
from fluxc.kernels.schemas import PAGE

Array = np.ndarray
_SPARE = 64
"""Slots of a copy beyond those in use, so that a growing request is not copied at every step."""


class OnnxPrograms:
    """The programs of an ONNX engine directory, on the CPU, on all cores or as many as OMP_NUM_THREADS says."""

    def __init__(self, engine: EngineDir) -> None:
        found = engine.manifest
        self.layers = tuple(LayerShape(**layer) for layer in found.layers)
        self.vocabulary, self.context, self.rope_limit = found.vocabulary, found.context, found.rope_limit
        self.dtype, self.device = np.dtype(found.dtype), "cpu"
        files = {phase: program["file"] for phase, program in found.programs.items()}
        threads = os.environ.get("OMP_NUM_THREADS", "")
        self.sessions = OnnxSessions(engine.path, files, int(threads) if threads.isdigit() else 0)

    def open_store(self, pages: int) -> OnnxStore:
        """A cache of `pages` pages."""
        return OnnxStore(self, pages)

    def prefill(
        self, input_ids: Array, prompt_lens: Array, route_bias: Array, logits_at: Array, *, dense: bool = False
    ) -> Iterator[LayerKV | Prefilled]:
        """See `Programs.prefill`. `dense` forces every route to full; the routers run, and are not asked."""
        bias = np.full_like(route_bias, np.inf) if dense else route_bias
        found = self.sessions.prefill(input_ids, prompt_lens, bias, logits_at)
        routes, scores = found["routes"][:, 0], found["scores"][:, 0]
        for index, shape in enumerate(self.layers):
            route = None if shape.row is None else bool(routes[shape.row])
            yield LayerKV(index, found.pop(f"k_{index}"), found.pop(f"v_{index}"), route)
        yield Prefilled(found["logits"], routes, None if dense else scores)


class OnnxStore:
    """`Store` of an ONNX engine: an array [pages,2,Hk,PAGE,D].

    The decode program has one cache a layer and request, the engine pages for all. The requests of a step are copied
    out of their pages; the copies serve the following steps too, as long as the same requests decode and no other call
    writes to the pages. A further turn runs token by token.
    """

    def __init__(self, programs: OnnxPrograms, pages: int) -> None:
        shape = programs.layers[0]
        self._programs = programs
        self.cache = np.empty((pages, 2, shape.kv_heads, PAGE, shape.head_dim), programs.dtype)
        self._copies: dict[str, Array] = {}
        self._table: Any = np.empty(0, np.int32)
        self._lens: Any = np.empty(0, np.int32)

    def prefill(self, tokens: Sequence[int], prompt: int, bias: Array, dense: bool) -> Iterator[LayerKV | Prefilled]:
        """See `Store.prefill`. The program runs as a whole, so all layers come at once."""
        ids, last = np.array([tokens], np.int64), np.array([[len(tokens) - 1]])
        return self._programs.prefill(ids, np.array([prompt]), bias, last, dense=dense)

    def write(self, k: Array, v: Array, slots: Array) -> None:
        """See `Store.write`."""
        self._copies = {}
        self._put(k, v, slots)

    def decode(self, ids: Array, positions: Array, slots: Array, table: Array, lens: Array) -> Array:
        """See `Store.decode`."""
        own = _logical(slots, table, lens)
        if not self._still_good(table, lens):
            self._copies = self._copied(table, lens, lens)
        logits = self._step(self._copies, ids, positions, own, lens)
        self._write_back(self._copies, own[..., None], slots[..., None])
        self._table, self._lens = table, lens
        return logits

    def append(
        self,
        input_ids: Array,
        position_ids: Array,
        seq_lens: Array,
        slots: Array,
        table: Array,
        lens: Array,
        start: Array,
        sinks: Array,
        windows: Array,
        logits_at: Array,
    ) -> Array:
        """See `Programs.append`. A request whose turn is over writes its padding nowhere."""
        self._copies = {}
        whole = lens_of((start + seq_lens)[None], sinks, windows)
        copies = self._copied(table, whole, lens)
        rows = []
        for at in range(input_ids.shape[1]):
            position = np.minimum(start + at, start + seq_lens - 1)
            own = np.where((at >= seq_lens)[None], -1, slots_of(position[None], sinks, windows))
            held = lens_of(position[None] + 1, sinks, windows)
            rows.append(self._step(copies, input_ids[:, at, None], position[:, None], own, held))
        turn = start[:, None] + np.arange(input_ids.shape[1])
        self._write_back(copies, slots_of(turn[None], sinks[..., None], windows[..., None]), slots)
        return np.take_along_axis(np.stack(rows, 1), logits_at[..., None], axis=1)

    def _still_good(self, table: Array, lens: Array) -> bool:
        """Whether the copies hold what the pages of `table` hold: every layer one token longer, or a full ring."""
        if not self._copies or table.shape[:2] != self._table.shape[:2]:
            return False
        known = np.arange(self._table.shape[2]) < pages_of(self._lens)[..., None]
        same_pages = np.array_equal(np.where(known, table[..., : known.shape[2]], 0), np.where(known, self._table, 0))
        room = np.array([self._copies[f"k_cache_{index}"].shape[2] for index in range(len(lens))])
        grown = (lens == self._lens + 1) | (lens == self._lens)
        return same_pages and bool(grown.all()) and bool((lens.max(1) < room).all())

    def _step(self, copies: dict[str, Array], ids: Array, positions: Array, own: Array, lens: Array) -> Array:
        """One token of each request; own -1 writes to the last slot, which no request reads."""
        sizes = np.array([copies[f"k_cache_{index}"].shape[2] for index in range(len(own))])
        slots = np.where(own < 0, sizes[:, None] - 1, own)
        return self._programs.sessions.decode(copies, ids, positions, slots, lens.astype(np.int32))

    def _copied(self, table: Array, room: Array, lens: Array) -> dict[str, Array]:
        """[B,Hk,C,D] for each layer with `room` i[A,B] slots and spare ones; zero from lens i[A,B] on."""
        copies = {}
        for index in range(len(table)):
            count = int(pages_of(room[index].max()))
            pages = np.minimum(table[index, :, :count], len(self.cache) - 1)
            size = int(room[index].max()) + _SPARE
            for half, name in enumerate("kv"):
                made = np.zeros((len(pages), self.cache.shape[2], size, self.cache.shape[4]), self.cache.dtype)
                for row, own in enumerate(pages):
                    used = int(lens[index, row])
                    made[row, :, :used] = _joined(self.cache[own, half])[:, :used]
                copies[f"{name}_cache_{index}"] = made
        return copies

    def _write_back(self, copies: dict[str, Array], own: Array, slots: Array) -> None:
        """Rows own i64[A,B,S] of the copies to slots i64[A,B,S] of the cache; slots of -1 are dropped."""
        rows = np.arange(own.shape[1])[:, None]
        for index in range(len(own)):
            at = np.maximum(own[index], 0)
            k, v = (copies[f"{name}_cache_{index}"][rows, :, at].transpose(0, 2, 1, 3) for name in "kv")
            self._put(k, v, slots[index])

    def _put(self, k: Array, v: Array, slots: Array) -> None:
        """k, v [B,Hk,S,D] to slots i64[B,S]."""
        row, at = np.nonzero(slots >= 0)
        page, offset = np.divmod(slots[row, at], PAGE)
        for half, values in enumerate((k, v)):
            self.cache[page, half, :, offset] = values[row, :, at]


def _joined(pages: Array) -> Array:
    """Pages [n,Hk,PAGE,D] of one request as [Hk,n*PAGE,D]."""
    turned: Any = pages.transpose(1, 0, 2, 3)
    return turned.reshape(turned.shape[0], -1, turned.shape[3])


def _logical(slots: Array, table: Array, lens: Array) -> Array:
    """Slots i64[A,B] of the pool, counted within each request's own pages; -1 stays -1."""
    known = np.arange(table.shape[2]) < pages_of(lens)[..., None]
    match = (table == (slots // PAGE)[..., None]) & known
    return np.where(slots < 0, slots, match.argmax(-1) * PAGE + slots % PAGE)
