"""fluxc's ops as functions of an ONNX model: which ones a graph needs, and their bodies in standard operators."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnxscript import values

from fluxc.errors import UserError
from fluxc.exporters.onnx_attention import DOMAIN, HEADER, OPSET, Rows, Triangle, rows_function
from fluxc.exporters.onnx_routed import routed_function, some_function, triangle_function

_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(bool)", "tensor(int64)", "tensor(int32)"]


@dataclasses.dataclass
class Functions:
    """The functions one model needs, by name; equal layers share one.

    `opset`: of the standard operators they are written in. `pins`: routes of layers whose attention is no conditional.
    """

    bodies: dict[str, str] = dataclasses.field(default_factory=dict)
    opset: int = OPSET
    pins: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def parsed(self) -> list[onnx.FunctionProto]:
        """All of them, those that are called before those that call."""
        found = [onnx.parser.parse_function(body) for body in self.bodies.values()]
        for standard in (each for function in found for each in function.opset_import if not each.domain):
            standard.version = self.opset
        return found

    def table(self) -> dict[Any, Callable[..., Any]]:
        """How `torch.onnx.export` translates each op of ours, and linear over weights stored once."""
        ops = torch.ops.fluxc
        methods: dict[Any, Callable[..., Any]] = {
            ops.attention.default: self._attention,
            ops.routed_attention.default: self._routed_attention,
            ops.router_pool.default: self._router_pool,
            ops.grouped_mm.default: self._grouped_mm,
        }
        return {op: _plain(method) for op, method in methods.items()}

    def _call(self, name: str, body: str, inputs: Sequence[Any]) -> Any:
        self.bodies.setdefault(name, body)
        return values.Op(values.Opset(DOMAIN, 1), name, _schema(name, len(inputs)))(*inputs)

    def _rows(self, rows: Rows) -> None:
        self.bodies.setdefault(rows.name, rows_function(rows))

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
        return self.full_rows(Rows(scale, 0, window, softcap, sink_logits is not None), q, k, v, sink_logits)

    def full_rows(self, rows: Rows, q: Any, k: Any, v: Any, sinks: Any) -> Any:
        """An attention without a route."""
        from onnxscript import opset21 as op

        inputs = [q, k, v, op.Constant(value_ints=[0]), *([] if sinks is None else [sinks])]
        return self._call(rows.name, rows_function(rows), inputs)

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
        self._rows(full)
        self._rows(streaming)
        sparse: Rows | Triangle = streaming
        if last or decode_full:
            sparse = Triangle(streaming, last, decode_full)
            for rows in (full, streaming):
                self.bodies.setdefault(f"some_{rows.name}", some_function(rows))
            self.bodies.setdefault(sparse.name, triangle_function(sparse))
        if layer in self.pins:
            return self._pinned(full if self.pins[layer] == "full" else sparse, q, k, v, prompt_lens, sink_logits)
        return self.routed(full, sparse, q, k, v, route, prompt_lens, sink_logits)

    def routed(
        self, full: Rows, sparse: Rows | Triangle, q: Any, k: Any, v: Any, route: Any, prompt_lens: Any, sinks: Any
    ) -> Any:
        """The branch of the route."""
        inputs = [q, k, v, route, prompt_lens, *([] if sinks is None else [sinks])]
        return self._call(f"routed_{sparse.name}", routed_function(full, sparse), inputs)

    def _pinned(self, kind: Rows | Triangle, q: Any, k: Any, v: Any, prompt_lens: Any, sink_logits: Any) -> Any:
        """One branch alone."""
        from onnxscript import opset21 as op

        lens = [prompt_lens] if isinstance(kind, Triangle) else []
        inputs = [q, k, v, op.Constant(value_ints=[0]), *lens, *([] if sink_logits is None else [sink_logits])]
        return self._call(kind.name, self.bodies[kind.name], inputs)

    def _router_pool(self, q: Any, prompt_lens: Any, *, pool: int) -> Any:
        name = f"router_pool_{pool}"
        return self._call(name, router_pool_function(name, pool), [q, prompt_lens])

    def _grouped_mm(self, x: Any, weight: Any, ends: Any) -> Any:
        return self._call("grouped_mm", grouped_mm_function(), [x, weight, ends])


def _plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as a function, to which torch's exporter can attach what it finds out about the signature."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


def _schema(name: str, inputs: int) -> onnx.defs.OpSchema:
    """The schema that onnxscript asks for: one output, any types."""
    parameter = onnx.defs.OpSchema.FormalParameter
    names = [f"input_{index}" for index in range(inputs)]
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[parameter(each, f"T{index}") for index, each in enumerate(names)],
        outputs=[parameter("out", "TO")],
        type_constraints=[(f"T{index}", _TYPES, "") for index in range(inputs)] + [("TO", _TYPES, "")],
    )


def router_pool_function(name: str, pool: int) -> str:
    """`name(q [1,H,S,D], prompt_lens i64[1]) -> f32[1,D]`: the mean of both ends of the prompt."""
    return f"""{HEADER}
{name} (q, prompt_lens) => (out) {{
  zero = Constant <value_ints = [0]> ()
  two = Constant <value_ints = [2]> ()
  pool = Constant <value_ints = [{pool}]> ()
  prefix_end = Min (pool, prompt_lens)
  before = Sub (prompt_lens, pool)
  suffix_start = Max (before, zero)
  prefix = Slice (q, zero, prefix_end, two)
  suffix = Slice (q, suffix_start, prompt_lens, two)
  both = Concat <axis = 2> (prefix, suffix)
  wide = Cast <to = 1> (both)
  axes = Constant <value_ints = [1, 2]> ()
  out = ReduceMean <keepdims = 0> (wide, axes)
}}"""


def grouped_mm_function() -> str:
    """`grouped_mm(x [T,K], weight [E,K,N], ends i32[E]) -> [T,N]`: one product for each group that has rows."""
    return f"""{HEADER}
grouped_mm (x, weight, ends) => (out) {{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  zero0 = Squeeze (zero)
  width = Shape <start = 2, end = 3> (weight)
  empty_shape = Concat <axis = 0> (zero, width)
  filler = Constant <value_float = 0.0> ()
  filler_as = CastLike (filler, x)
  empty = Expand (filler_as, empty_shape)
  ends_long = Cast <to = 7> (ends)
  starts_all = Concat <axis = 0> (zero, ends_long)
  experts = Shape <start = 0, end = 1> (weight)
  trips = Squeeze (experts)
  go = Constant <value_int = 1> ()
  begin = Cast <to = 9> (go)
  out = Loop (trips, begin, empty) <body = group (int64 step, bool on, done) => (bool still, more) {{
    still = Identity (on)
    step_one = Reshape (step, one)
    a = Gather (starts_all, step_one)
    e = Gather (ends_long, step_one)
    a0 = Squeeze (a)
    e0 = Squeeze (e)
    any = Less (a0, e0)
    more = If (any) <
      then_branch = some () => (longer) {{
        rows = Slice (x, a, e, zero)
        own = Gather (weight, step)
        product = MatMul (rows, own)
        longer = Concat <axis = 0> (done, product)
      }},
      else_branch = none () => (same) {{
        same = Identity (done)
      }}
    >
  }}>
}}"""
