"""fluxc's other ops for TensorRT, as functions of the model whose sizes no value decides."""

from __future__ import annotations

from fluxc.exporters.trt_attention import CONSTANTS, HEADER


def router_pool_function(name: str, pool: int) -> str:
    """`name(q [1,H,S,D], prompt_lens i64[1]) -> f32[1,D]`: the mean of both ends of the prompt."""
    return f"""{HEADER}
{name} (q, prompt_lens) => (out) {{
{CONSTANTS}
  pool = Constant <value_ints = [{pool}]> ()
  pool0 = Squeeze (pool)
  S = Shape <start = 2, end = 3> (q)
  last_row = Sub (S, one)
  numbers = Range (zero0, pool0, one0)
  before = Sub (prompt_lens, pool)
  numbers_end = Add (before, numbers)
  places = Concat <axis = 0> (numbers, numbers_end)
  from_zero = GreaterOrEqual (places, zero)
  in_prompt = Less (places, prompt_lens)
  counted = And (from_zero, in_prompt)
  places_low = Max (places, zero)
  inside = Min (places_low, last_row)
  rows = Gather <axis = 2> (q, inside)
  wide = Cast <to = 1> (rows)
  counted_axes = Constant <value_ints = [0, 1, 3]> ()
  mask = Unsqueeze (counted, counted_axes)
  nothing = Constant <value_float = 0.0> ()
  kept = Where (mask, wide, nothing)
  axes = Constant <value_ints = [1, 2]> ()
  sum = ReduceSum <keepdims = 0> (kept, axes)
  shorter = Min (pool, prompt_lens)
  pooled = Mul (shorter, two)
  H = Shape <start = 1, end = 2> (q)
  values = Mul (pooled, H)
  divisor = Cast <to = 1> (values)
  out = Div (sum, divisor)
}}"""


def grouped_mm_function() -> str:
    """`grouped_mm(x [T,K], weight [E,K,N], ends i32[E]) -> [T,N]`: every expert on all rows; its own are kept."""
    return f"""{HEADER}
grouped_mm (x, weight, ends) => (out) {{
{CONSTANTS}
  T = Shape <start = 0, end = 1> (x)
  T0 = Squeeze (T)
  N = Shape <start = 2, end = 3> (weight)
  numbers = Range (zero0, T0, one0)
  ends_long = Cast <to = 7> (ends)
  starts_all = Concat <axis = 0> (zero, ends_long)
  shape = Concat <axis = 0> (T, N)
  filler = Constant <value_float = 0.0> ()
  filler_as = CastLike (filler, x)
  empty = Expand (filler_as, shape)
  experts = Shape <start = 0, end = 1> (weight)
  trips = Squeeze (experts)
  go = Constant <value_int = 1> ()
  begin = Cast <to = 9> (go)
  out = Loop (trips, begin, empty) <body = group (int64 step, bool on, done) => (bool still, more) {{
    still = Identity (on)
    step_one = Reshape (step, one)
    a = Gather (starts_all, step_one)
    e = Gather (ends_long, step_one)
    late = GreaterOrEqual (numbers, a)
    early = Less (numbers, e)
    own_flat = And (late, early)
    own = Unsqueeze (own_flat, one)
    expert_one = Gather <axis = 0> (weight, step_one)
    expert = Squeeze (expert_one, zero)
    product = MatMul (x, expert)
    more = Where (own, product, done)
  }}>
}}"""
