"""What the README of an AOTI engine says about running it."""

from __future__ import annotations

from fluxc.exporters.engine_dir import EngineManifest


def how(manifest: EngineManifest) -> str:
    """Markdown text."""
    return _HOW


_HOW = """`*.pt2` are native code. Once opened they can do whatever the process can: open an engine only if you
trust its maker. They run on machines like the one they were built on (`machine` in `programs.json`) with the
same torch.

## With fluxc

```python
engine = fluxc.load(".")  # compares hashes, machine and torch first
```

## Without

`prefill.pt2`, `decode.pt2` and `append.pt2` are AOTInductor packages of several models each, for
`torch::inductor::AOTIModelPackageLoader(package, model)` or `torch._inductor.package.load_package`. `programs.json`
says how a program is run: its `calls`, in order, each with the model, the values it takes and leaves, and the tensors
of `weights/` that are its constants (`load_constants(..., user_managed=True)`). Layers that are alike are one model
with different constants. `name[3]` is row 3 of a value.

**Prefill** takes one request: `input_ids`, `position_ids` i64[1,S], `seq_lens`, `prompt_lens` i64[1], `route_bias`
f32[L,1], `logits_at` i64[1,N]. `route_bias` is added to each score: the biases of a budget are in `plan.json`
(`curve`), `+inf` forces full attention, `-inf` sparse. It leaves `logits`, `routes`, `scores`, and keys and values of
each attention.

**Decode** takes one token of each of B requests, `slots` i64[A,B], `page_table` i32[A,B,P], `lens` i32[A,B] (this token
included) and the `cache` [pages,2,Hk,64,D] of all layers, which it writes in place. A slot is page * 64 + offset.

Attention and the cache's operators are `torch.ops.fluxc.*`: a process has to register them before it runs a package, in
Python with `fluxc.kernels.register()`, in C++ by linking `libfluxc_ops.so`. `python -m fluxc.exporters.cpp_build` makes
it, and `fluxc-aoti`, a program that runs this directory without Python.
"""
