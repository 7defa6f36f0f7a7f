"""How an ONNX engine is run, with and without fluxc: its part of the README."""

from __future__ import annotations

from fluxc.exporters.engine_dir import EngineManifest


def how(manifest: EngineManifest) -> str:
    """Markdown text."""
    return "\n".join([_FLUXC, _ONNX, *([_HF] if "model" in manifest.programs else []), *_pins(manifest)])


def _pins(manifest: EngineManifest) -> list[str]:
    if not manifest.pins:
        return []
    low, high = manifest.budgets
    layers = ", ".join(f"{layer} ({route})" for layer, route in manifest.pins.items())
    return [f"\n{len(manifest.pins)} layers are no conditionals: {layers}. Budgets from {low:g} to {high:g} remain."]


_FLUXC = """## With fluxc

```python
import fluxc

engine = fluxc.load("this folder")  # imports neither torch nor transformers
print(engine.generate("What is the capital of France?", max_new_tokens=16).text)
```

`fluxc calibrate <this folder> --budget 0.3` changes the budget, in `plan.json` alone.
"""

_ONNX = """## With ONNX Runtime alone

```python
import json, numpy as np, onnxruntime as ort

prefill = ort.InferenceSession("prefill.onnx")
decode = ort.InferenceSession("decode.onnx")  # both read weights.bin
```

With the session option `session.disable_prepacking` set to 1 both sessions read one mapping of `weights.bin`, as fluxc
does; without it each keeps a rearranged copy of the weights, and a step takes about a third less time.

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

_HF = """
## With optimum

`model.onnx` takes one request and has Hugging Face's names and a dense cache (`past_key_values.N.key`, ...). A prompt
takes the routes that `route_bias` gives (an input with a default: the biases of the budget above); later tokens attend
to everything, and nothing is evicted.

```python
from optimum.onnxruntime import ORTModelForCausalLM

model = ORTModelForCausalLM.from_pretrained("this folder", file_name="model.onnx", use_io_binding=False)
```
"""
