"""Routed attention as functions of an ONNX model: an `If` over the functions of its rows, and triangle rows."""

from __future__ import annotations

from fluxc.exporters.onnx_attention import CONSTANTS, DOMAIN, HEADER, Rows, Triangle


def triangle_function(kind: Triangle) -> str:
    """`kind.name(q, k, v, first, prompt_lens i64[1]) -> [1,S,H,Dv]`: dense rows are computed apart."""
    streaming, full, extra = kind.streaming, kind.full, kind.streaming.inputs
    return f"""{HEADER}
{kind.name} (q, k, v, first, prompt_lens{extra}) => (out) {{
{CONSTANTS}
  S = Shape <start = 2, end = 3> (q)
  last = Constant <value_ints = [{kind.last}]> ()
  before_last = Sub (prompt_lens, last)
  begin = Max (before_last, zero)
  end = {"Identity (S)" if kind.decode_full else "Identity (prompt_lens)"}
  q_a = Slice (q, zero, begin, two)
  q_b = Slice (q, begin, end, two)
  q_c = Slice (q, end, S, two)
  out_a = {DOMAIN}.some_{streaming.name} (q_a, k, v, zero{extra})
  out_b = {DOMAIN}.some_{full.name} (q_b, k, v, begin{extra})
  out_c = {DOMAIN}.some_{streaming.name} (q_c, k, v, end{extra})
  out = Concat <axis = 1> (out_a, out_b, out_c)
}}"""


def some_function(rows: Rows) -> str:
    """`some_<rows.name>`: the same function, of rows that may be none."""
    return f"""{HEADER}
some_{rows.name} (q, k, v, first{rows.inputs}) => (out) {{
{CONSTANTS}
  count = Shape <start = 2, end = 3> (q)
  count0 = Squeeze (count)
  any = Greater (count0, zero0)
  out = If (any) <
    then_branch = some () => (rows) {{
      rows = {DOMAIN}.{rows.name} (q, k, v, first{rows.inputs})
    }},
    else_branch = none () => (empty) {{
      turned = Transpose <perm = [0, 2, 1, 3]> (q)
      width = Shape <start = 3, end = 4> (v)
      kept = Shape <start = 0, end = 3> (turned)
      shape = Concat <axis = 0> (kept, width)
      empty = Reshape <allowzero = 1> (turned, shape)
    }}
  >
}}"""


def routed_function(full: Rows, sparse: Rows | Triangle) -> str:
    """`routed_<sparse.name>(q, k, v, route bool[1], prompt_lens i64[1])`: the branch of the route, alone."""
    extra = full.inputs
    lens = ", prompt_lens" if isinstance(sparse, Triangle) else ""
    return f"""{HEADER}
routed_{sparse.name} (q, k, v, route, prompt_lens{extra}) => (out) {{
  zero = Constant <value_ints = [0]> ()
  take_full = Squeeze (route)
  out = If (take_full) <
    then_branch = full () => (full_rows) {{
      full_rows = {DOMAIN}.{full.name} (q, k, v, zero{extra})
    }},
    else_branch = sparse () => (sparse_rows) {{
      sparse_rows = {DOMAIN}.{sparse.name} (q, k, v, zero{lens}{extra})
    }}
  >
}}"""


def routed_past_function(full: Rows, sparse: Rows | Triangle) -> str:
    """`routed_past_<sparse.name>(q, k, v, route, prompt_lens, first)`: full where tokens came before."""
    extra = full.inputs
    lens = ", prompt_lens" if isinstance(sparse, Triangle) else ""
    return f"""{HEADER}
routed_past_{sparse.name} (q, k, v, route, prompt_lens, first{extra}) => (out) {{
  zero = Constant <value_ints = [0]> ()
  later = Greater (first, zero)
  either = Or (route, later)
  take_full = Squeeze (either)
  out = If (take_full) <
    then_branch = full () => (full_rows) {{
      full_rows = {DOMAIN}.{full.name} (q, k, v, first{extra})
    }},
    else_branch = sparse () => (sparse_rows) {{
      sparse_rows = {DOMAIN}.{sparse.name} (q, k, v, zero{lens}{extra})
    }}
  >
}}"""
