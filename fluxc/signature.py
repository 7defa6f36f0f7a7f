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
"""

from __future__ import annotations

CAPTURED_INPUTS = ("input_ids", "position_ids", "seq_lens", "logits_at")
ROUTED_INPUTS = ("input_ids", "position_ids", "seq_lens", "prompt_lens", "route_bias", "logits_at")
CAPTURED_OUTPUTS = ("logits",)
ROUTED_OUTPUTS = ("logits", "routes", "scores")
