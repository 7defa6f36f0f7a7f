"""The README of an engine directory: what is in it, and how to run it with and without fluxc."""

from __future__ import annotations

from fluxc.exporters import aoti_readme, onnx_readme, trt_readme
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
    return {"aoti": aoti_readme, "trt": trt_readme}.get(manifest.target, onnx_readme).how(manifest)


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
