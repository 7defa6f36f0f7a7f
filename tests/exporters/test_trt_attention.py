"""Attention as ONNX functions for TensorRT against fluxc's own ops, in ONNX Runtime."""

from __future__ import annotations

import functools

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from fluxc import kernels  # noqa: E402
from fluxc.exporters import trt_attention, trt_ops  # noqa: E402
from fluxc.exporters.onnx_attention import DOMAIN, OPSET, Rows, Triangle  # noqa: E402
from fluxc.exporters.trt_attention import CHUNK  # noqa: E402

HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3
SINK, WINDOW = 4, 12
LENGTHS = (1, 2, SINK, 17, SINK + WINDOW + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 45)
CASES = {
    "streaming": {},
    "no-sink": {"sink": 0},
    "softcap": {"softcap": 3.0},
    "sink-logits": {"sinks": True},
    "triangle": {"last": 5},
    "triangle-no-sink": {"last": 5, "sink": 0},
    "triangle-longer-than-a-chunk": {"last": CHUNK + 9},
    "decode-full": {"decode_full": True},
    "triangle-decode-full-sinks": {"last": 5, "decode_full": True, "sinks": True},
}
DEFAULT = {"sink": SINK, "softcap": 0.0, "sinks": False, "last": 0, "decode_full": False}


def run_function(body, call, inputs, result):
    """A session of a model of one call; `inputs` are its inputs as text."""
    text = f"""<ir_version: 10, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
g ({inputs}) => ({result}) {{
  out = {DOMAIN}.{call}
}}"""
    model = onnx.parser.parse_model(text)
    model.functions.append(onnx.parser.parse_function(body))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def session(sink, softcap, sinks, last, decode_full):
    full = Rows(SCALE, softcap=softcap, sinks=sinks)
    streaming = Rows(SCALE, sink, WINDOW, softcap, sinks)
    sparse = Triangle(streaming, last, decode_full) if last or decode_full else streaming
    extra = (f", float[{HEADS}] sink_logits", ", sink_logits") if sinks else ("", "")
    shapes = [f"float[1,{heads},S,{WIDTH}] {name}" for name, heads in zip("qkv", (HEADS, 2, 2), strict=True)]
    return run_function(
        trt_attention.routed_function(full, sparse),
        f"routed_{sparse.name} (q, k, v, route, prompt_lens{extra[1]})",
        f"{', '.join(shapes)}, bool[1] route, int64[1] prompt_lens{extra[0]}",
        f"float[1,S,{HEADS},{WIDTH}] out",
    )


def random_inputs(length, sinks):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return q, k, v, torch.randn(HEADS, generator=generator) if sinks else None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("route", [True, False])
def test_equals_the_op(name, route):
    kernels.register()
    case = DEFAULT | CASES[name]
    for length in LENGTHS:
        for prompt in sorted({length, max(1, length - 9)}):
            q, k, v, sinks = random_inputs(length, case["sinks"])
            given = {"q": q, "k": k, "v": v, "route": torch.tensor([route]), "prompt_lens": torch.tensor([prompt])}
            given |= {"sink_logits": sinks} if sinks is not None else {}
            (found,) = session(**case).run(None, {key: value.numpy() for key, value in given.items()})
            expected = torch.ops.fluxc.routed_attention(
                q,
                k,
                v,
                given["route"],
                given["prompt_lens"],
                scale=SCALE,
                layer=0,
                kind="triangle" if case["last"] else "streaming",
                sink=case["sink"],
                window=WINDOW,
                last=case["last"],
                decode_full=case["decode_full"],
                softcap=case["softcap"],
                sink_logits=sinks,
            )
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [0, 16])
def test_attention_that_is_not_routed(window):
    kernels.register()
    rows = Rows(SCALE, window=window)
    shapes = [f"float[1,{heads},S,{WIDTH}] {name}" for name, heads in zip("qkv", (HEADS, 2, 2), strict=True)]
    alone = run_function(
        trt_attention.rows_function(rows),
        f"{rows.name} (q, k, v)",
        ", ".join(shapes),
        f"float[1,S,{HEADS},{WIDTH}] out",
    )
    for length in LENGTHS:
        q, k, v, _ = random_inputs(length, False)
        (found,) = alone.run(None, {"q": q.numpy(), "k": k.numpy(), "v": v.numpy()})
        expected = torch.ops.fluxc.attention(q, k, v, scale=SCALE, layer=0, window=window)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=2e-6)


def test_router_pool():
    kernels.register()
    pool = 5
    alone = run_function(
        trt_ops.router_pool_function("router_pool", pool),
        "router_pool (q, prompt_lens)",
        f"float[1,{HEADS},S,{WIDTH}] q, int64[1] prompt_lens",
        f"float[1,{WIDTH}] out",
    )
    for length in (1, 4, 5, 6, 9, 10, 30):
        for prompt in sorted({length, (length + 1) // 2}):
            q, lens = random_inputs(length, False)[0], torch.tensor([prompt])
            (found,) = alone.run(None, {"q": q.numpy(), "prompt_lens": lens.numpy()})
            expected = torch.ops.fluxc.router_pool(q, lens, pool=pool)
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)
