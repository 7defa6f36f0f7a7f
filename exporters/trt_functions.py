"""fluxc's ops in an ONNX model for TensorRT: the same calls as for ONNX Runtime, with other bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from fluxc.errors import UserError
from fluxc.exporters.onnx_attention import Rows, Triangle
from fluxc.exporters.onnx_functions import Functions
from fluxc.exporters.trt_attention import routed_function, rows_function
from fluxc.exporters.trt_ops import router_pool_function

Branch = Literal["both", "full", "sparse"]


@dataclasses.dataclass
class TrtFunctions(Functions):
    """`branch`: what a routed attention becomes: the conditional, or the branch that is taken whatever its route.

    `rows`: the attentions without a conditional, by the name of their function.
    """

    branch: Branch = "both"
    rows: dict[str, Rows] = dataclasses.field(default_factory=dict)

    def _attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        scale: float,
        layer: int,
        window: int = 0,
        softcap: float = 0.0,
        sink_logits: Any = None,
        q_start: Any = None,
    ) -> Any:
        if q_start is not None:
            raise UserError(f"the attention of layer {layer} starts at a position of its own, which ONNX does not get")
        rows = Rows(scale, 0, window, softcap, sink_logits is not None)
        return self._rows_call(rows, [q, k, v], sink_logits)

    def _routed_attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        route: Any,
        prompt_lens: Any,
        *,
        scale: float,
        layer: int,
        kind: str,
        sink: int,
        window: int,
        last: int,
        decode_full: bool = False,
        softcap: float = 0.0,
        sink_logits: Any = None,
    ) -> Any:
        full = Rows(scale, 0, 0, softcap, sink_logits is not None)
        streaming = dataclasses.replace(full, sink=sink, window=window)
        triangle = bool(last or decode_full)
        branch = self.pins.get(layer, self.branch)
        if branch == "full" or (branch == "sparse" and not triangle):
            return self._rows_call(full if branch == "full" else streaming, [q, k, v], sink_logits)
        sparse = Triangle(streaming, last, decode_full) if triangle else streaming
        taken = _never() if branch == "sparse" else route
        inputs = [q, k, v, taken, prompt_lens, *([sink_logits] if full.sinks else [])]
        return self._call(f"routed_{sparse.name}", routed_function(full, sparse), inputs)

    def _rows_call(self, rows: Rows, inputs: Sequence[Any], sink_logits: Any) -> Any:
        self.rows[rows.name] = rows
        return self._call(rows.name, rows_function(rows), [*inputs, *([sink_logits] if rows.sinks else [])])

    def _router_pool(self, q: Any, prompt_lens: Any, *, pool: int) -> Any:
        name = f"router_pool_{pool}"
        return self._call(name, router_pool_function(name, pool), [q, prompt_lens])


def fused(rows: Rows | None) -> bool:
    """Whether TensorRT's own attention computes these rows: all keys up to their own, and nothing else."""
    return rows is not None and not (rows.window or rows.softcap or rows.sinks)


def _never() -> Any:
    """A route that is never full: bool[1]."""
    from onnxscript import opset21

    op: Any = opset21  # its stubs know the types of a graph's text, not of what is traced
    return op.Cast(op.Constant(value_ints=[0]), to=9)
