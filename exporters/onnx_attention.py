"""Attention in standard ONNX operators, as functions of the model: blocks of rows in a loop, no S x S tensor.

Each step of the loop takes `CHUNK` query rows and only the keys they can see: for streaming rows the sink and a window,
gathered; for full rows the keys up to the last of them. The largest tensor is H x CHUNK x keys.
"""

from __future__ import annotations

import dataclasses

DOMAIN = "fluxc"
OPSET = 21
CHUNK = 256
LOWEST = -1e30
HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>'


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the rows of one attention see. `window` 0: all keys up to their own. `sinks`: it has sink logits."""

    scale: float
    sink: int = 0
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def name(self) -> str:
        """Name of the function; equal settings share it."""
        kind = f"streaming_{self.sink}_{self.window}" if self.window else "full"
        extra = [f"cap_{_tag(self.softcap)}"] if self.softcap else []
        return "_".join([kind, f"scale_{_tag(self.scale)}", *extra, *(["sinks"] if self.sinks else [])])

    @property
    def inputs(self) -> str:
        """Its inputs after q, k, v and the absolute position of the first row."""
        return ", sink_logits" if self.sinks else ""


@dataclasses.dataclass(frozen=True)
class Triangle:
    """Streaming rows, but the `last` rows of the prompt see all keys, and with `decode_full` those after it too."""

    streaming: Rows
    last: int
    decode_full: bool

    @property
    def name(self) -> str:
        """Name of the function."""
        return f"triangle_{self.last}{'_decode_full' if self.decode_full else ''}_{self.streaming.name}"

    @property
    def full(self) -> Rows:
        """The dense rows."""
        return dataclasses.replace(self.streaming, sink=0, window=0)


def _tag(value: float) -> str:
    return value.hex().replace("-", "m").replace("+", "p").replace(".", "d")


def rows_function(rows: Rows) -> str:
    """`rows.name(q [1,H,R,D], k [1,Hk,T,D], v [1,Hk,T,Dv], first i64[1]) -> [1,R,H,Dv]`; row r stands at first + r."""
    return f"""{HEADER}
{rows.name} (q, k, v, first{rows.inputs}) => (out) {{
{CONSTANTS}
  rows_all = Shape <start = 2, end = 3> (q)
  H = Shape <start = 1, end = 2> (q)
  D = Shape <start = 3, end = 4> (q)
  Hk = Shape <start = 1, end = 2> (k)
  T = Shape <start = 2, end = 3> (k)
  Dv = Shape <start = 3, end = 4> (v)
  G = Div (H, Hk)
  chunk = Constant <value_ints = [{CHUNK}]> ()
  C = Min (chunk, rows_all)
  rounded = Add (rows_all, C)
  rounded_less = Sub (rounded, one)
  steps = Div (rounded_less, C)
  total = Mul (steps, C)
  missing = Sub (total, rows_all)
  no_pads = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
  pads = Concat <axis = 0> (no_pads, missing, zero)
  scale = Constant <value_float = {rows.scale!r}> ()
  scale_as = CastLike (scale, q)
  scaled = Mul (q, scale_as)
  padded = Pad (scaled, pads)
  keys = Transpose <perm = [0, 1, 3, 2]> (k)
  lowest = Constant <value_float = {LOWEST!r}> ()
  lowest_as = CastLike (lowest, q)
  nothing = Constant <value_float = 0.0> ()
  nothing_as = CastLike (nothing, q)
  GC = Mul (G, C)
  grouped = Concat <axis = 0> (one, Hk, GC, D)
  by_head = Concat <axis = 0> (H, C, Dv)
  trips = Squeeze (steps)
  go = Constant <value_int = 1> ()
  begin = Cast <to = 9> (go)
  blocks = Loop (trips, begin) <body = block (int64 step, bool on) => (bool still, part) {{
    still = Identity (on)
    step_one = Reshape (step, one)
    a = Mul (step_one, C)
    b = Add (a, C)
    q_rows = Slice (padded, a, b, two)
    q_group = Reshape (q_rows, grouped)
    row_a = Add (a, first)
    row_b = Add (b, first)
    e = Min (row_b, T)
    row_a0 = Squeeze (row_a)
    row_b0 = Squeeze (row_b)
    e0 = Squeeze (e)
    i_flat = Range (row_a0, row_b0, one0)
    i = Unsqueeze (i_flat, one)
{_streaming_keys(rows) if rows.window else _FULL_KEYS}
    weighted = MatMul (q_group, k_seen)
    seen = Shape <start = 3, end = 4> (k_seen)
    split = Concat <axis = 0> (Hk, G, C, seen)
    scores = Reshape (weighted, split)
{_softcap(rows.softcap)}
    bias = Where (visible, nothing_as, lowest_as)
    masked = Add (capped, bias)
{_WITH_SINKS if rows.sinks else "    weights = Softmax <axis = -1> (masked)"}
    joined = Concat <axis = 0> (one, Hk, GC, seen)
    weights_group = Reshape (weights, joined)
    values = MatMul (weights_group, v_seen)
    heads = Reshape (values, by_head)
    part = Transpose <perm = [1, 0, 2]> (heads)
  }}>
  flat_shape = Concat <axis = 0> (one, total, H, Dv)
  flat = Reshape (blocks, flat_shape)
  out = Slice (flat, zero, rows_all, one)
}}"""


CONSTANTS = """  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  zero0 = Squeeze (zero)
  one0 = Squeeze (one)"""

_FULL_KEYS = """    k_seen = Slice (keys, zero, e, three)
    v_seen = Slice (v, zero, e, two)
    j = Range (zero0, e0, one0)
    visible = LessOrEqual (j, i)"""

_WITH_SINKS = """    sink_shape = Concat <axis = 0> (Hk, G, one, one)
    sink_column = Reshape (sink_logits, sink_shape)
    sink_like = CastLike (sink_column, q)
    column_shape = Concat <axis = 0> (Hk, G, C, one)
    column = Expand (sink_like, column_shape)
    with_sink = Concat <axis = -1> (masked, column)
    weights_all = Softmax <axis = -1> (with_sink)
    weights = Slice (weights_all, zero, seen, three)"""


def _streaming_keys(rows: Rows) -> str:
    """The sink, then the keys from the first row's window on; keys between them are not read."""
    return f"""    sink = Constant <value_ints = [{rows.sink}]> ()
    window = Constant <value_ints = [{rows.window}]> ()
    reach = Sub (row_a, window)
    reach_one = Add (reach, one)
    low = Max (reach_one, zero)
    sink_end = Min (sink, low)
    k_sink = Slice (keys, zero, sink_end, three)
    k_window = Slice (keys, low, e, three)
    k_seen = Concat <axis = 3> (k_sink, k_window)
    v_sink = Slice (v, zero, sink_end, two)
    v_window = Slice (v, low, e, two)
    v_seen = Concat <axis = 2> (v_sink, v_window)
    low0 = Squeeze (low)
    sink_end0 = Squeeze (sink_end)
    j_sink = Range (zero0, sink_end0, one0)
    j_window = Range (low0, e0, one0)
    j = Concat <axis = 0> (j_sink, j_window)
    causal = LessOrEqual (j, i)
    distance = Sub (i, j)
    near = Less (distance, window)
    early = Less (j, sink)
    kept = Or (near, early)
    visible = And (causal, kept)"""


def _softcap(softcap: float) -> str:
    if not softcap:
        return "    capped = Identity (scores)"
    return f"""    cap = Constant <value_float = {softcap!r}> ()
    cap_as = CastLike (cap, q)
    small = Div (scores, cap_as)
    bounded = Tanh (small)
    capped = Mul (bounded, cap_as)"""
