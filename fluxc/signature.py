"""The one signature of every captured and routed program, whatever the model or target.

Captured programs have the inputs CAPTURED_INPUTS and the single output `logits`; routed programs have ROUTED_INPUTS
and ROUTED_OUTPUTS. B is the batch, S the padded length, N the rows that reach the LM head, L the routable layers in
graph order, V the vocabulary.

| name | type | meaning |
| --- | --- | --- |
| input_ids | i64[B,S] | token ids, right padded |
| position_ids | i64[B,S] | position of each token |
| seq_lens | i64[B] | valid tokens of each row |
| prompt_lens | i64[B] | tokens of the prompt, <= seq_lens; what follows is answer |
| route_bias | f32[L,B] | added to each score; +inf full, -inf sparse |
| logits_at | i64[B,N] | rows of the sequence that reach the LM head |
| logits | [B,N,V] | in the model's own dtype |
| routes | bool[L,B] | True: full attention |
| scores | f32[L,B] | logit[full] - logit[sparse], before the bias |

Programs that are trained have SOFTENED_INPUTS and SOFTENED_OUTPUTS: `noise` f32[L,B] is added to score and bias, `tau`
f32[] divides their sum, and `weights` f32[L,B] is the share of full attention in each layer's mix.

Programs of the engine have a paged KV cache. A counts the attentions of the model, P the pages of a request. Prefill
programs are the routed and the captured one for one request, with `k_0`, `v_0`, ... of each attention after the outputs
they have. Decode programs have DECODE_INPUTS with S = 1 and `logits` [B,V]; append programs, for a further turn of S
tokens, have APPEND_INPUTS and `logits` [B,N,V].

| name | type | meaning |
| --- | --- | --- |
| cache | [pages,2,Hk,PAGE,D] | keys and values of all layers, in the model's dtype; written in place |
| slots | i64[A,B] or i64[A,B,S] | where each token's key and value go: page * PAGE + offset, -1 nowhere |
| page_table | i32[A,B,P] | the pages of each request, in order |
| lens | i32[A,B] | valid slots: the token of this step included (decode), before the turn (append) |
| start | i64[B] | tokens of the text before the turn |
| sinks, windows | i64[A,B] | sizes of a layer kept as a ring; 0 and 0 where all tokens are kept |
"""

from __future__ import annotations

CAPTURED_INPUTS = ("input_ids", "position_ids", "seq_lens", "logits_at")
ROUTED_INPUTS = ("input_ids", "position_ids", "seq_lens", "prompt_lens", "route_bias", "logits_at")
CAPTURED_OUTPUTS = ("logits",)
ROUTED_OUTPUTS = ("logits", "routes", "scores")
SOFTENED_INPUTS = (*ROUTED_INPUTS[:-1], "noise", "tau", "logits_at")
SOFTENED_OUTPUTS = ("logits", "weights", "scores")

DECODE_INPUTS = ("input_ids", "position_ids", "cache", "slots", "page_table", "lens")
APPEND_INPUTS = (
    *("input_ids", "position_ids", "logits_at", "cache", "slots", "page_table", "lens", "start"),
    *("sinks", "windows"),
)
KV_TYPES = {
    "slots": ("int64", "ABS"),
    "page_table": ("int32", "ABP"),
    "lens": ("int32", "AB"),
    "start": ("int64", "B"),
    "sinks": ("int64", "AB"),
    "windows": ("int64", "AB"),
}
"""dtype and axes of the inputs that a KV cache adds; a decode program's slots are [A,B]."""
