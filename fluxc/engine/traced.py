"""The engine's programs as traced graphs, derived by passes from one routed program over one set of weights.

A model.flux directory stores the routed and the captured graph. Prefill, dense prefill, decode and append are derived
from the routed one when it is loaded, and no further graphs are stored: reading one graph from disk costs more than
deriving all. Measured with a Llama of 30 layers (2,588 nodes), CPU seconds, each result verified: reading a graph 7.5;
`merge-linears` 1.8, prefill 1.6, decode 2.1, append 1.2, dense prefill 1.4. Each form is derived when it is first
called. All of them hold the weights of the program they come from: resident memory after a prefill, a decode step and
a turn of a Qwen2-1.5B shape in bf16, mapped from its directory, was 1.03 times the weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule

from fluxc import kernels, passes
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.shapes import LayerShape
from fluxc.ir.graph import argument, is_call, user_inputs
from fluxc.ir.kv import kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.parts import build_whole
from fluxc.ir.phases import LayerPieces, Phases, PrefillRun
from fluxc.passes.chunk_rows import ChunkRows
from fluxc.passes.last_rows import LastRows
from fluxc.passes.merge_linears import MergeLinears
from fluxc.passes.rope_per_request import rope_limit
from fluxc.passes.split_phases import SplitPhases


class TracedPrograms:
    """`Programs` of a routed program (or a captured one: no layer is routable then).

    `context`: the model's, in tokens, 0 where it is not known. `merge`: GEMMs that read the same value become one:
    "views" where their weights lie side by side, as `write_flux` and `FluxDir.load` leave them; "copy" everywhere, by
    copying weights that lie apart, and the given program keeps its own. `chunk_rows`: rows of the prompt that MLPs
    take at a time. `fuse`: norms, RoPE, KV writes and SwiGLU by the fused ops of `kernels`, in all phases; None does so
    on a GPU alone, where they pay. Raises UnsupportedAttentionError for layers that one cache cannot hold.
    """

    def __init__(
        self,
        program: ExportedProgram,
        *,
        context: int = 0,
        merge: Literal["no", "views", "copy"] = "views",
        chunk_rows: int = 8192,
        fuse: bool | None = None,
    ) -> None:
        kernels.register()
        self.layers = layer_shapes(program)
        self.vocabulary = _vocabulary(program)
        self.context = context
        self.rope_limit = rope_limit(program)
        self.dtype = kv_geometry(attention_nodes(program.graph)).dtype
        self.device: torch.device = _input(program, "input_ids").device
        self._program = program if merge == "no" else MergeLinears(copy=merge == "copy").apply(program).program
        self._chunk = ChunkRows(chunk_rows)
        self.fuse = self.device.type == "cuda" if fuse is None else fuse
        self._stage = "routed" if "route_bias" in user_inputs(program) else "captured"

    def prefill(
        self, input_ids: Tensor, prompt_lens: Tensor, route_bias: Tensor, logits_at: Tensor, *, dense: bool = False
    ) -> Iterator[LayerKV | Prefilled]:
        """See `Programs.prefill`."""
        phases = self._dense_phases if dense else self._phases
        length = input_ids.shape[1]
        inputs = {
            "input_ids": input_ids,
            "position_ids": torch.arange(length, device=input_ids.device)[None],
            "seq_lens": torch.full_like(prompt_lens, length),
            "prompt_lens": prompt_lens,
            "route_bias": route_bias,
            "logits_at": logits_at,
        }
        run = PrefillRun(phases, {name: inputs[name] for name in phases.inputs})
        _step(run, phases.prologue)
        for index, layer in enumerate(phases.layers):
            yield _attend(run, layer, index, self.layers[index].routable)
            _step(run, layer.after)
        yield self._prefilled(_step(run, phases.epilogue, phases.outputs))

    @torch.no_grad()
    def decode(
        self, cache: Tensor, input_ids: Tensor, position_ids: Tensor, slots: Tensor, page_table: Tensor, lens: Tensor
    ) -> Tensor:
        """See `Programs.decode`."""
        return self.decode_graph(input_ids, position_ids, cache, slots, page_table, lens)[0]

    @torch.no_grad()
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
        """See `Programs.append`."""
        last = (start + seq_lens - 1)[:, None]  # padding must not reach positions that turn the factors of a request
        positions = torch.minimum(position_ids, last)
        return self._append(input_ids, positions, logits_at, cache, slots, page_table, lens, start, sinks, windows)[0]

    def with_dense_attention(self, wrap: Callable[[nn.Module], nn.Module]) -> TracedPrograms:
        """The same programs, in whose dense prefill `wrap` of it stands for each routable attention: to time them."""
        phases = self._dense_phases
        layers = [
            dataclasses.replace(layer, attend=dataclasses.replace(layer.attend, module=wrap(layer.attend.module)))
            if shape.routable
            else layer
            for layer, shape in zip(phases.layers, self.layers, strict=True)
        ]
        other = copy.copy(self)
        other.__dict__["_dense_phases"] = dataclasses.replace(phases, layers=tuple(layers))
        return other

    @functools.cached_property
    def _phases(self) -> Phases:
        return self._split(dense=self._stage == "captured")

    @functools.cached_property
    def _dense_phases(self) -> Phases:
        return self._split(dense=True)

    @functools.cached_property
    def decode_graph(self) -> GraphModule:
        """What `decode` runs; takes input_ids, position_ids, cache, slots, page_table and lens."""
        return build_whole(passes.decode_pipeline(fuse=self.fuse).run(self._program, self._stage).program)

    @functools.cached_property
    def _append(self) -> GraphModule:
        return build_whole(passes.append_pipeline(fuse=self.fuse).run(self._program, self._stage).program)

    def _split(self, dense: bool) -> Phases:
        program = passes.prefill_pipeline(dense=dense, fuse=self.fuse).run(self._program, self._stage).program
        return LastRows().apply(self._chunk.apply(SplitPhases().apply(program)))

    def _prefilled(self, outputs: dict[str, Tensor]) -> Prefilled:
        logits, *rest = outputs.values()
        if rest:
            routes, scores = rest
            return Prefilled(logits, routes[:, 0], scores[:, 0])
        routable = sum(layer.routable for layer in self.layers)
        return Prefilled(logits, torch.ones(routable, dtype=torch.bool, device=logits.device), None)


def layer_shapes(program: ExportedProgram) -> tuple[LayerShape, ...]:
    """The attention layers of a captured or routed program; raises UnsupportedAttentionError as TracedPrograms does."""
    nodes = attention_nodes(program.graph)
    geometry = kv_geometry(nodes)
    shapes: list[LayerShape] = []
    for node in nodes:
        is_routed = is_call(node, torch.ops.fluxc.routed_attention)
        window = 0 if is_routed else argument(node, "window")
        row = sum(shape.routable for shape in shapes) if is_routed else None
        shapes.append(LayerShape(argument(node, "layer"), is_routed, row, geometry.heads, geometry.width, window))
    return tuple(shapes)


@torch.no_grad()
def _step(run: PrefillRun, *args: Any) -> dict[str, Tensor]:
    return run.step(*args)


def _attend(run: PrefillRun, layer: LayerPieces, index: int, routable: bool) -> LayerKV:
    """The layer up to and with its attention; a routable layer without a router is full."""
    route = _step(run, layer.before, (layer.route,) if layer.route else ())
    flag = _Flag(route[layer.route]) if layer.route else None
    kept = _step(run, layer.attend, (layer.k, layer.v))
    is_full = flag.read() if flag else (True if routable else None)
    return LayerKV(index, _alone(kept[layer.k]), _alone(kept[layer.v]), is_full)


def _alone(x: Tensor) -> Tensor:
    """The values in a storage of their own: part of a merged projection would keep all of that alive."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone(memory_format=torch.contiguous_format)


class _Flag:
    """A bool[1] on its way to the host: a GPU works on the attention while the host waits for what came before it."""

    def __init__(self, value: Tensor) -> None:
        self._host = value.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if value.is_cuda else None
        if self._copied:
            self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> bool:
        if self._copied:
            self._copied.synchronize()
        return bool(self._host)


def _vocabulary(program: ExportedProgram) -> int:
    outputs: Any = program.graph.output_node().args[0]
    return int(outputs[0].meta["val"].shape[-1])


def _input(program: ExportedProgram, name: str) -> Tensor:
    return next(node for node in program.graph.nodes if node.name == name).meta["val"]
