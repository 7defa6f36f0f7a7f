"""What the README of a TensorRT engine directory says on running it, and what was read of its engines."""

from __future__ import annotations

from typing import Any

from fluxc.exporters.engine_dir import EngineManifest


def how(manifest: EngineManifest) -> str:
    """Markdown text."""
    programs = manifest.programs
    built = programs["decode"]["built"]
    split = "prefill" not in programs
    return f"""No TensorRT engine was run by the authors of fluxc. What was compared with the routed program are the
ONNX files these engines were built from, in ONNX Runtime; `onnx_sha256` in `engine.json` names them.

## With fluxc

```python
import fluxc

engine = fluxc.load("this-folder", "cuda")  # a GPU that {built["library"]} {built["version"]} supports; no torch
```

An engine opens in the version of {built["library"]} that built it, and in no other. Build it again with `fluxc export`.

| engine | MB | built in | conditionals | largest buffer | heads x 512 x longest prompt |
| --- | --- | --- | --- | --- | --- |
{chr(10).join(_row(name, program["built"]) for name, program in programs.items())}

Conditionals and buffers were read {_SOURCES[built["read_from"]]}. Profiles: prompts of up to {_longest(programs)}
tokens, decode steps of up to {programs["decode"]["profile"]["input_ids"][2][0]} requests.

## With TensorRT alone

{_SPLIT if split else _PREFILL}
{_DECODE}"""


_SOURCES = {
    "plan": "from the host's program that TensorRT keeps in the engine as text, on a machine without a GPU",
    "inspector": "with the engine inspector",
    "": "nowhere: this version of TensorRT gives no such text, and there was no GPU to open the engines on",
}


def _row(name: str, built: dict[str, Any]) -> str:
    numbers = f"{built['bytes'] / 1e6:.1f} | {built['seconds']:.0f} s | {built['conditionals']} of {built['routable']}"
    memory = f"{built['largest_buffer_bytes'] / 1e6:.1f} MB | {built['attention_bound_bytes'] / 1e6:.1f} MB"
    return f"| `{name}` | {numbers} | {memory} |"


def _longest(programs: dict[str, Any]) -> int:
    prefill = next(program for name, program in programs.items() if name != "decode")
    longest: int = prefill["profile"]["input_ids"][2][1]
    return longest


_PREFILL = """**prefill.engine** takes one request: `input_ids`, `position_ids` i64[1,S], `seq_lens`,
`prompt_lens` i64[1] (S), `route_bias` f32[L,1] and `logits_at` i64[1,N], the rows to give logits of (S - 1 for the next
token). The bias is added to each score: `+inf` forces full attention, `-inf` sparse; those of a budget are in
`plan.json`. It gives `logits` [1,N,V], `routes` bool[L,1] (True: full), `scores`, and `k_a`, `v_a` [1,Hk,S,D] of each
attention a, keys after RoPE."""

_SPLIT = """**prefill_full.engine** and **prefill_sparse.engine** take one request: `input_ids`, `position_ids`
i64[1,S], `seq_lens`, `prompt_lens` i64[1] (S), `route_bias` f32[L,1] and `logits_at` i64[1,N], the rows to give logits
of. In the one every layer runs full, in the other sparse, whatever `routes` says: score + bias > 0, for a host to
choose by. fluxc runs the sparse one, and the full one as well where at least half of the routes are True. They give
`logits` [1,N,V], `routes` bool[L,1], `scores`, and `k_a`, `v_a` [1,Hk,S,D] of each attention a, keys after RoPE."""

_DECODE = """
**decode.engine** takes one token of each of B requests: `input_ids`, `position_ids` i64[B,1], `slots` i64[A,B] (where
this token's key and value go), `lens` i32[A,B] (valid slots, this one included) and the caches `k_cache_a`, `v_cache_a`
[B,Hk,C,D], finite everywhere. They come back as `k_cache_a_out`, `v_cache_a_out`, in memory of their own.

The token at position p has slot p in a full layer. In a layer that went sparse (`decode` is `sparse` in `plan.json`) it
has slot p while p < sink, else sink + (p - sink) % window, and `lens` stops at sink + window; a layer with a window of
its own (`layers` in `engine.json`) is the same with sink 0.
"""
