"""Attention for TensorRT in standard ONNX operators, as functions of the model: like `onnx_attention.py`, other sizes.

TensorRT fixes every size of a loop before its first step, and its builder (RTX 1.7) crashes on two `If`s that hold
loops. So a loop takes `CHUNK` rows at a time and the `If` of a routed layer stands inside it, where only the chosen
branch runs; a full chunk meets all keys and hides those after its rows: twice the products that causal attention needs.
The largest tensor is H x CHUNK x keys, keys being T, or sink + window + CHUNK - 1.
"""

from __future__ import annotations

from fluxc.exporters.onnx_attention import DOMAIN, LOWEST, OPSET, Rows, Triangle

CHUNK = 256
HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>'
CONSTANTS = """  zero = Constant <value_ints = [0]> ()
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  zero0 = Squeeze (zero)
  one0 = Squeeze (one)"""


def rows_function(rows: Rows) -> str:
    """`rows.name(q [1,H,S,D], k [1,Hk,S,D], v [1,Hk,S,Dv]) -> [1,S,H,Dv]`."""
    near = bool(rows.window)
    block = _near(rows, "part") if near else _far(rows, "part", "causal")
    return _loop(f"{rows.name} (q, k, v{rows.inputs})", rows, block, far=not near, near=rows if near else None)


def fused_function(rows: Rows) -> str:
    """`rows.name` of full rows as TensorRT's own attention, which ONNX Runtime does not know."""
    return f"""{HEADER}
{rows.name} (q, k, v) => (out) {{
  scale = Constant <value_float = {rows.scale!r}> ()
  scale_as = CastLike (scale, q)
  scaled = Mul (q, scale_as)
  turned = TRT_Attention <is_causal = 1, TRT_decomposable = 1> (scaled, k, v)
  out = Transpose <perm = [0, 2, 1, 3]> (turned)
}}"""


def routed_function(full: Rows, sparse: Rows | Triangle) -> str:
    """`routed_<sparse.name>(q, k, v, route bool[1], prompt_lens i64[1]) -> [1,S,H,Dv]`: one `If`, inside the loop.

    A triangle takes chunks that hold dense rows through the full branch, where the other rows see their streaming set.
    """
    streaming = sparse.streaming if isinstance(sparse, Triangle) else sparse
    triangle = _dense_rows(sparse) if isinstance(sparse, Triangle) else ""
    condition = "takes_full" if triangle else "take_full"
    visible = "seen_far" if triangle else "causal"
    block = f"""{triangle}
    part = If ({condition}) <
      then_branch = full () => (part_far) {{
{_far(full, "part_far", visible, _streaming_mask(streaming) if triangle else "")}
      }},
      else_branch = sparse () => (part_near) {{
{_near(streaming, "part_near")}
      }}
    >"""
    head = f"routed_{sparse.name} (q, k, v, route, prompt_lens{full.inputs})"
    return _loop(head, full, block, far=True, near=streaming, before="  take_full = Squeeze (route)\n")


def _loop(head: str, rows: Rows, block: str, *, far: bool, near: Rows | None, before: str = "") -> str:
    sizes = (_far_sizes() if far else "") + (_near_sizes(near) if near else "")
    return f"""{HEADER}
{head} => (out) {{
{CONSTANTS}
  S = Shape <start = 2, end = 3> (q)
  H = Shape <start = 1, end = 2> (q)
  D = Shape <start = 3, end = 4> (q)
  Hk = Shape <start = 1, end = 2> (k)
  Dv = Shape <start = 3, end = 4> (v)
  G = Div (H, Hk)
  C = Constant <value_ints = [{CHUNK}]> ()
  chunk_less = Constant <value_ints = [{CHUNK - 1}]> ()
  rounded = Add (S, chunk_less)
  steps = Div (rounded, C)
  total = Mul (steps, C)
  last_row = Sub (S, one)
  scale = Constant <value_float = {rows.scale!r}> ()
  scale_as = CastLike (scale, q)
  scaled = Mul (q, scale_as)
  by_group = Concat <axis = 0> (Hk, G, S, D)
  queries = Reshape <allowzero = 1> (scaled, by_group)
  k_shape = Concat <axis = 0> (Hk, S, D)
  k_rows = Reshape <allowzero = 1> (k, k_shape)
  v_shape = Concat <axis = 0> (Hk, S, Dv)
  v_rows = Reshape <allowzero = 1> (v, v_shape)
  lowest = Constant <value_float = {LOWEST!r}> ()
  lowest_as = CastLike (lowest, q)
  GC = Mul (G, C)
  grouped = Concat <axis = 0> (Hk, GC, D)
  by_head = Concat <axis = 0> (H, C, Dv)
  C0 = Squeeze (C)
  lanes = Range (zero0, C0, one0)
{sizes}{_SINK_COLUMN if rows.sinks else ""}{before}  trips = Squeeze (steps)
  go = Constant <value_int = 1> ()
  begin = Cast <to = 9> (go)
  blocks = Loop (trips, begin) <body = block (int64 step, bool on) => (bool still, part) {{
    still = Identity (on)
    step_one = Reshape (step, one)
    a = Mul (step_one, C)
    row = Add (a, lanes)
    row_inside = Min (row, last_row)
    q_rows = Gather <axis = 2> (queries, row_inside)
    q_group = Reshape <allowzero = 1> (q_rows, grouped)
    i = Unsqueeze (row, one)
{block}
  }}>
  flat_shape = Concat <axis = 0> (one, total, H, Dv)
  flat = Reshape <allowzero = 1> (blocks, flat_shape)
  out = Slice (flat, zero, S, one)
}}"""


_SINK_COLUMN = """  sink_shape = Concat <axis = 0> (Hk, G, one, one)
  sink_one = Reshape <allowzero = 1> (sink_logits, sink_shape)
  sink_like = CastLike (sink_one, q)
  column_shape = Concat <axis = 0> (Hk, G, C, one)
  column = Expand (sink_like, column_shape)
"""


def _far_sizes() -> str:
    """What does not change from chunk to chunk of full rows."""
    return """  S0 = Squeeze (S)
  j_far = Range (zero0, S0, one0)
  keys_far = Transpose <perm = [0, 2, 1]> (k_rows)
  split_far = Concat <axis = 0> (Hk, G, C, S)
  joined_far = Concat <axis = 0> (Hk, GC, S)
"""


def _near_sizes(rows: Rows) -> str:
    """The same of streaming rows: the sink, and a stretch that holds the windows of all rows of a chunk."""
    stretch = rows.window + CHUNK - 1
    sink = f"""  sink = Constant <value_ints = [{rows.sink}]> ()
  sink0 = Squeeze (sink)
  j_sink = Range (zero0, sink0, one0)
  sink_inside = Min (j_sink, last_row)
  k_sink = Gather <axis = 1> (k_rows, sink_inside)
  v_sink = Gather <axis = 1> (v_rows, sink_inside)
"""
    return f"""  window = Constant <value_ints = [{rows.window}]> ()
  window_less = Constant <value_ints = [{rows.window - 1}]> ()
  stretch = Constant <value_int = {stretch}> ()
  offsets = Range (zero0, stretch, one0)
  seen_near = Constant <value_ints = [{stretch + rows.sink}]> ()
  split_near = Concat <axis = 0> (Hk, G, C, seen_near)
  joined_near = Concat <axis = 0> (Hk, GC, seen_near)
{sink if rows.sink else ""}"""


def _far(rows: Rows, out: str, visible: str, mask: str = "") -> str:
    """Rows of the chunk against all keys; `visible` names the mask, which `mask` computes if it is not causal."""
    return f"""    causal = LessOrEqual (j_far, i)
{mask}{_attend(rows, "far", "keys_far", "v_rows", "S", visible, out)}"""


def _near(rows: Rows, out: str) -> str:
    """Rows of the chunk against the sink and the stretch; the keys between them are not read."""
    sink = """    beyond_sink = GreaterOrEqual (j_window, sink)
    seen_window = And (in_window, beyond_sink)
    seen_sink = LessOrEqual (j_sink, i)
    visible_near = Concat <axis = 1> (seen_sink, seen_window)
    k_near = Concat <axis = 1> (k_sink, k_window)
    v_near = Concat <axis = 1> (v_sink, v_window)"""
    none = """    visible_near = Identity (in_window)
    k_near = Identity (k_window)
    v_near = Identity (v_window)"""
    return f"""    start = Sub (a, window_less)
    low = Max (start, zero)
    j_window = Add (low, offsets)
    window_inside = Min (j_window, last_row)
    k_window = Gather <axis = 1> (k_rows, window_inside)
    v_window = Gather <axis = 1> (v_rows, window_inside)
    causal_near = LessOrEqual (j_window, i)
    distance = Sub (i, j_window)
    near = Less (distance, window)
    in_window = And (causal_near, near)
{sink if rows.sink else none}
    keys_near = Transpose <perm = [0, 2, 1]> (k_near)
{_attend(rows, "near", "keys_near", "v_near", "seen_near", "visible_near", out)}"""


def _attend(rows: Rows, which: str, keys: str, values: str, seen: str, visible: str, out: str) -> str:
    softmax = f"""    with_sink = Concat <axis = -1> (masked, column)
    weights_all = Softmax <axis = -1> (with_sink)
    weights = Slice (weights_all, zero, {seen}, three)"""
    return f"""    weighted = MatMul (q_group, {keys})
    scores = Reshape <allowzero = 1> (weighted, split_{which})
{_softcap(rows.softcap)}
    masked = Where ({visible}, capped, lowest_as)
{softmax if rows.sinks else "    weights = Softmax <axis = -1> (masked)"}
    weights_group = Reshape <allowzero = 1> (weights, joined_{which})
    product = MatMul (weights_group, {values})
    heads = Reshape <allowzero = 1> (product, by_head)
    {out} = Transpose <perm = [1, 0, 2]> (heads)"""


def _softcap(softcap: float) -> str:
    if not softcap:
        return "    capped = Identity (scores)"
    return f"""    cap = Constant <value_float = {softcap!r}> ()
    cap_as = CastLike (cap, q)
    small = Div (scores, cap_as)
    bounded = Tanh (small)
    capped = Mul (bounded, cap_as)"""


def _dense_rows(kind: Triangle) -> str:
    """Which rows of the chunk are dense, and whether it goes through the full branch."""
    dense = "Identity (late)" if kind.decode_full else "And (late, in_prompt)"
    return f"""    last = Constant <value_ints = [{kind.last}]> ()
    first_dense = Sub (prompt_lens, last)
    late = GreaterOrEqual (i, first_dense)
    in_prompt = Less (i, prompt_lens)
    dense = {dense}
    dense_number = Cast <to = 7> (dense)
    dense_axes = Constant <value_ints = [0, 1]> ()
    dense_count = ReduceSum <keepdims = 0> (dense_number, dense_axes)
    any_dense = Greater (dense_count, zero0)
    takes_full = Or (take_full, any_dense)"""


def _streaming_mask(rows: Rows) -> str:
    """bool[C,S]: all keys of dense rows and of full layers, the streaming set of the others."""
    sink = """    early_far = Less (j_far, sink)
    kept_far = Or (near_far, early_far)"""
    return f"""    distance_far = Sub (i, j_far)
    near_far = Less (distance_far, window)
{sink if rows.sink else "    kept_far = Identity (near_far)"}
    whole_row = Or (dense, take_full)
    shown_far = Or (kept_far, whole_row)
    seen_far = And (causal, shown_far)
"""
