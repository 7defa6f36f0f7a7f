"""The exact `torch.library` schema of every op, and the rules each implementation keeps.

Axes: B batch, S queries, T keys, H query heads, Hk key/value heads (H a multiple of Hk), D key width, Dv value width,
L routable layers, P pages of a request. Rules that hold for all ops:

- q, k, v share one dtype (fp32, fp16, bf16) and device; any strides; sums run in fp32 at least.
- q is [B,H,S,D] after RoPE, k [B,Hk,S,D], v [B,Hk,S,Dv], heads never repeated. Attention outputs are freshly
  allocated, contiguous [B,S,H,Dv] in q's dtype: fake and real agree on that, whatever the inputs' strides.
- Right padding: row b holds valid tokens first. Causal rows never see padding; rows of padding hold finite values
  that mean nothing.
- `layer` is the index of the attention in the model. It does not change the result.
- `window` 0 means none, else query i sees key j only when i - j < window. The streaming set of (sink, window) is
  j <= i and (j < sink or i - j < window).
- `softcap` 0 means none, else scores become softcap * tanh(score / softcap) before masking.
- `sink_logits` [H]: one more score a row that takes weight in the softmax and carries no value (GPT-OSS).
- `q_start` i64[B]: absolute position of the first query; None means 0.
- Integer tensors are i64 unless the name says otherwise.
"""

from __future__ import annotations

NAMESPACE = "fluxc"
PAGE = 64

_TAIL = "float softcap=0., Tensor? sink_logits=None"

SCHEMAS: dict[str, str] = {
    # Full causal attention; the normal form of every attention after capture.
    "attention": (
        "(Tensor q, Tensor k, Tensor v, *, float scale, int layer, int window=0, float softcap=0., "
        "Tensor? sink_logits=None, Tensor? q_start=None) -> Tensor"
    ),
    # Every row sees the streaming set.
    "streaming_attention": (
        "(Tensor q, Tensor k, Tensor v, *, float scale, int layer, int sink, int window, float softcap=0., "
        "Tensor? sink_logits=None, Tensor? q_start=None) -> Tensor"
    ),
    # Streaming rows, except rows prompt_lens - last <= i < prompt_lens, which see all keys j <= i, and, with
    # decode_full, also every row i >= prompt_lens. last=0 with decode_full is streaming with `decode: full`.
    "triangle_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor prompt_lens, *, float scale, int layer, int sink, int window, "
        f"int last, bool decode_full=False, {_TAIL}) -> Tensor"
    ),
    # block_index i32[B,H,Sb,M], block_count i32[B,H,Sb]: the key blocks of `block` tokens that the rows of each block
    # of queries read, causally: ascending, none after the rows' own block. Rows that see no key are 0. block is a power
    # of two, at least 16.
    "block_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor block_index, Tensor block_count, *, float scale, int layer, "
        f"int block, {_TAIL}) -> Tensor"
    ),
    # Which key blocks matter: -> block_index i32[B,H,Sb,Sb] (entries past the count mean nothing), block_count
    # i32[B,H,Sb]. Queries and keys are taken `stride` tokens at a time; the score of two such chunks is the mean of
    # q . k over their antidiagonal (scorer "antidiagonal", XAttention) or over all pairs ("pooled"), times scale. Each
    # chunk of queries gets a softmax over the chunks of keys up to its own, summed over a block. A block of queries
    # keeps its largest sums, as few as reach `threshold` of the total, and always the first block and its own. Tokens
    # past the end count as zeros. stride divides block.
    "block_scores": (
        "(Tensor q, Tensor k, *, float scale, int layer, int block, int stride, float threshold, "
        'str scorer="antidiagonal") -> (Tensor, Tensor)'
    ),
    # route bool[B]: True is `attention`, False the sparse kind with its sizes: "streaming" | "triangle" | "block". With
    # block the prompt's rows read what block_scores finds with (block, stride, threshold) in the prompt alone, and rows
    # after it all keys; it needs decode_full, and sink, window and last mean nothing to it. full_kind "block" (not with
    # the kind block) computes full requests in that way instead of by `attention`, from the same three sizes.
    "routed_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor route, Tensor prompt_lens, *, float scale, int layer, str kind, "
        f"int sink, int window, int last, bool decode_full=False, {_TAIL}, int block=0, int stride=0, "
        'float threshold=0., str full_kind="dense") -> Tensor'
    ),
    # Mean over heads and over rows [0, min(pool, n)) and [max(0, n - pool), n), n = prompt_lens; overlapping rows
    # count twice, as in the paper: mean of the prefix mean and the suffix mean. q is before RoPE, [B,H,S,D];
    # -> fp32 [B,D].
    "router_pool": "(Tensor q, Tensor prompt_lens, *, int pool) -> Tensor",
    # router_pool, encoder and head fused: -> fp32 logits [B,2], full first.
    "router": (
        "(Tensor q, Tensor prompt_lens, Tensor encoder_0_weight, Tensor encoder_0_bias, Tensor encoder_2_weight, "
        "Tensor encoder_2_bias, Tensor head_0_weight, Tensor head_0_bias, Tensor head_2_weight, Tensor head_2_bias, "
        "Tensor head_4_weight, Tensor head_4_bias, *, int pool) -> Tensor"
    ),
    # cache [pages,2,Hk,PAGE,D]; k, v [B,Hk,S,D]; slots i64[B,S], slot = page * PAGE + offset; -1 drops the token.
    # No slot appears twice in a call.
    "kv_write": "(Tensor(a!) cache, Tensor k, Tensor v, Tensor slots) -> ()",
    # q [B,H,D]; page_table i32[B,P]; lens i32[B] valid slots, the token of this call included: -> [B,H,D]. Order of
    # the slots does not matter; a request with lens 0 gets zeros. Page numbers past a request's lens are not read.
    "decode_attention": (
        f"(Tensor q, Tensor cache, Tensor page_table, Tensor lens, *, float scale, int layer, {_TAIL}) -> Tensor"
    ),
    # A new turn of S tokens on top of a kept cache, before the turn itself is written to it: k, v [B,Hk,S,D] are the
    # turn's own. start i64[B]: tokens before the turn; lens i32[B]: valid slots before the turn. sinks, windows i64[B]
    # say which layers of which requests are rings: 0, 0 is a full layer (slot s holds position s, lens = start); else
    # slots [0, sink) hold positions [0, sink), and slot s >= sink the newest position p < start with p >= sink and
    # (p - sink) % window = s - sink, lens = min(start, sink + window); a layer's own window has sink 0. Rows of a ring
    # see the streaming set of (sink, window): a slot that holds a key past a row's window is not read by that row.
    # Rows past a request's own turn are padding like any other: causal, finite, without meaning. -> [B,S,H,D].
    "append_attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor cache, Tensor page_table, Tensor lens, Tensor start, Tensor sinks, "
        f"Tensor windows, *, float scale, int layer, {_TAIL}) -> Tensor"
    ),
    # q [B,H,S,D], k and v [B,Hk,S,D] before norm and RoPE; q_weight, k_weight [D] of an RMS norm over each head, None
    # for none; cos, sin [B,S,R], R even, at most D: columns d and d + R/2 of the first R turn together, the rest stay.
    # Writes k and v to the cache like kv_write and returns q and k, [B,H,S,D] transposed views of [B,S,H,D], and
    # router_pool of the normed q before RoPE, fp32 [B,D]. pool 0: nothing is pooled, prompt_lens is not read, and the
    # third result is [0,D].
    "qk_norm_rope_cache": (
        "(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
        "Tensor(a!) cache, Tensor slots, Tensor prompt_lens, *, float eps, int pool) -> (Tensor, Tensor, Tensor)"
    ),
    # x, residual [..,W], weight [W] -> (normalised, sum), contiguous: sum = x + residual in x's dtype, normalised =
    # RMSNorm(sum) in fp32, rounded to x's dtype, times weight.
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, *, float eps) -> (Tensor, Tensor)",
    # x [T,K] sorted by group, weight [E,K,N] (any strides), ends i32[E]: rows ends[e-1] to ends[e] times weight[e];
    # ends[E-1] = T: -> [T,N]. The products of a mixture of experts.
    "grouped_mm": "(Tensor x, Tensor weight, Tensor ends) -> Tensor",
    # gate, up of one shape: -> silu(gate) * up, contiguous.
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
}
