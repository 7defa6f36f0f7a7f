"""The routers' pooling for TensorRT, as a function of the model whose sizes no value decides."""

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
