"""The README of an engine directory: what is in it, and how to run it with and without fluxc."""

from __future__ import annotations

from fluxc.exporters import trt_readme
from fluxc.exporters.engine_dir import EngineManifest
from fluxc.plan import Plan


def readme(manifest: EngineManifest, plan: Plan) -> str:
    """Markdown text."""
    sparse = ", ".join(sorted({f"{layer.kind} (sink {layer.sink}, window {layer.window})" for layer in plan.layers}))
    files = "\n".join(f"| `{name}` | {entry.bytes:,} |" for name, entry in sorted(manifest.files.items()))
    return f"""# An engine for {manifest.target}

{plan.model.family}, {manifest.dtype}, {len(manifest.layers)} attention layers, {len(plan.layers)} with a router.
Sparse layers: {sparse or "none"}. Selected budget: {plan.budget:g}. {_verified(manifest)}

| file | bytes |
| --- | --- |
{files}

`engine.json` lists these files with their SHA-256 and the inputs and outputs of each program. fluxc compares the hashes
before it opens anything. They show damage, not intent: whoever can change a file can change the manifest as well.

{_how(manifest)}"""


def _how(manifest: EngineManifest) -> str:
    return trt_readme.how(manifest) if manifest.target == "trt" else _ONNX


def _verified(manifest: EngineManifest) -> str:
    if not manifest.verified:
        return "It was not compared with the routed program (`--no-verify`)."
    found = manifest.verified
    lengths = ", ".join(map(str, found["lengths"]))
    return (
        f"Compared with the routed program at {lengths} tokens, both routes forced and as chosen: logits differ by at "
        f"most {found['prefill']:.1e} in prefill and {found['decode']:.1e} in decode (largest allowed "
        f"{found['tolerance']:.0e})."
    )


_ONNX = """## With ONNX Runtime alone

```python
import json, numpy as np, onnxruntime as ort

prefill = ort.InferenceSession("prefill.onnx")
decode = ort.InferenceSession("decode.onnx")  # both read weights.bin
```

**Prefill** takes one request: `input_ids`, `position_ids` i64[1,S], `seq_lens`, `prompt_lens` i64[1] (S), `route_bias`
f32[L,1] and `logits_at` i64[1,N], the rows to give logits of (S - 1 for the next token). An input that the model does
not read is absent. `route_bias` is added to each score: the biases of a budget are in `plan.json` (`curve`, linear
between its points), `+inf` forces full attention, `-inf` sparse. Outputs: `logits` [1,N,V], `routes` bool[L,1] (True:
full), `scores`, and `k_a`, `v_a` [1,Hk,S,D] of each attention a, keys after RoPE.

**Decode** takes one token of each of B requests: `input_ids`, `position_ids` i64[B,1], `slots` i64[A,B] (where this
token's key and value go), `lens` i32[A,B] (valid slots, this one included) and the caches `k_cache_a`, `v_cache_a`
[B,Hk,C,D], which may be as long as each layer needs and must be finite everywhere (start with zeros). They come back
as `k_cache_a_out`, `v_cache_a_out`: bind the same memory as input and output, and nothing is copied.

The token at position p has slot p in a full layer. In a layer that went sparse (`decode` is `sparse` in `plan.json`) it
has slot p while p < sink, else sink + (p - sink) % window, and `lens` stops at sink + window; a layer with a window of
its own (`layers` in `engine.json`) is the same with sink 0.
"""
