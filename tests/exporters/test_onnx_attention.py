"""Attention as ONNX functions against fluxc's own ops, in ONNX Runtime."""

from __future__ import annotations

import functools

import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from fluxc import kernels  # noqa: E402
from fluxc.exporters import onnx_attention as functions  # noqa: E402
from fluxc.exporters import onnx_routed as routed  # noqa: E402
from fluxc.exporters.onnx_attention import CHUNK, Rows, Triangle  # noqa: E402

HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3
SINK, WINDOW = 4, 12
LENGTHS = (1, 2, SINK, 17, SINK + WINDOW + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 45)
CASES = {
    "streaming": {},
    "softcap": {"softcap": 3.0},
    "sink-logits": {"sinks": True},
    "triangle": {"last": 5},
    "decode-full": {"decode_full": True},
    "triangle-decode-full-sinks": {"last": 5, "decode_full": True, "sinks": True},
}


@functools.cache
def session(softcap=0.0, sinks=False, last=0, decode_full=False):
    """A model of one routed attention."""
    full = Rows(SCALE, softcap=softcap, sinks=sinks)
    streaming = Rows(SCALE, SINK, WINDOW, softcap, sinks)
    texts = [functions.rows_function(full), functions.rows_function(streaming)]
    sparse = streaming
    if last or decode_full:
        sparse = Triangle(streaming, last, decode_full)
        texts += [routed.some_function(full), routed.some_function(streaming)]
        texts.append(routed.triangle_function(sparse))
    texts.append(routed.routed_function(full, sparse))
    extra = ("", "")
    if sinks:
        extra = (f", float[{HEADS}] sink_logits", ", sink_logits")
    shape = f"[1,{HEADS},S,{WIDTH}] q, float[1,{KEY_HEADS},S,{WIDTH}] k, float[1,{KEY_HEADS},S,{WIDTH}] v"
    text = f"""<ir_version: 10, opset_import: ["" : {functions.OPSET}, "{functions.DOMAIN}" : 1]>
g (float{shape}, bool[1] route, int64[1] prompt_lens{extra[0]}) => (float[1,S,{HEADS},{WIDTH}] out) {{
  out = {functions.DOMAIN}.routed_{sparse.name} (q, k, v, route, prompt_lens{extra[1]})
}}"""
    model = onnx.parser.parse_model(text)
    model.functions.extend(onnx.parser.parse_function(body) for body in texts)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_inputs(length, sinks):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    return q, k, v, torch.randn(HEADS, generator=generator) if sinks else None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("route", [True, False])
def test_equals_the_op(name, route):
    kernels.register()
    case = {"softcap": 0.0, "sinks": False, "last": 0, "decode_full": False, **CASES[name]}
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
                sink=SINK,
                window=WINDOW,
                last=case["last"],
                decode_full=case["decode_full"],
                softcap=case["softcap"],
                sink_logits=sinks,
            )
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=2e-6)


def test_settings_that_differ_have_names_that_differ():
    rows = [Rows(0.1), Rows(0.2), Rows(0.1, 4, 8), Rows(0.1, 4, 9), Rows(0.1, softcap=2.0), Rows(0.1, sinks=True)]
    names = [each.name for each in rows] + [Triangle(rows[2], 3, False).name, Triangle(rows[2], 3, True).name]
    assert len(set(names)) == len(names)
