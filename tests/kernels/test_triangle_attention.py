"""`fluxc::triangle_attention` against its dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.triangle_attention import op
from fluxc.kernels.triangle_attention.reference import triangle_attention as reference
from fluxc.testing import LargestAllocation, PoisonedMemory, assert_close, gradients, layouts, random_qkv

kernels.register()
triangle = torch.ops.fluxc.triangle_attention
streaming = torch.ops.fluxc.streaming_attention
attention = torch.ops.fluxc.attention
HOW = {"scale": 0.3, "layer": 0}
SIZES = {"sink": 3, "window": 20, "last": 10}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def prompts(*lengths):
    return torch.tensor(lengths)


def agrees(q, k, v, prompt_lens, **options):
    actual = triangle(q, k, v, prompt_lens, **HOW, **options)
    assert_close(actual, reference(q, k, v, prompt_lens, **HOW, **options))


@pytest.mark.parametrize("decode_full", [False, True])
@pytest.mark.parametrize("prompt", [1, 9, 10, 11, 23, 32, 33, 34, 99, 100])
@pytest.mark.parametrize("last", [0, 1, 10, 200])
def test_equals_the_reference(prompt, last, decode_full):
    options = SIZES | {"last": last, "decode_full": decode_full}
    agrees(*random_qkv(2, 4, 2, 100, 16), prompts(prompt, 100), **options)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 400),
    share=st.floats(0, 1),
    sink=st.integers(0, 80),
    window=st.integers(1, 300),
    last=st.integers(0, 200),
    decode_full=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_any_sizes(rows, share, sink, window, last, decode_full, softcap):
    options = {"sink": sink, "window": window, "last": last, "decode_full": decode_full, "softcap": softcap}
    agrees(*random_qkv(1, 2, 1, rows, 4), prompts(int(share * rows)), **options)


def test_no_dense_rows_is_streaming():
    q, k, v = random_qkv(2, 4, 2, 90, 8)
    out = triangle(q, k, v, prompts(50, 90), **HOW, sink=3, window=20, last=0)
    assert torch.equal(out, streaming(q, k, v, **HOW, sink=3, window=20))


def test_all_rows_dense_is_attention():
    q, k, v = random_qkv(2, 4, 2, 90, 8)
    out = triangle(q, k, v, prompts(50, 90), **HOW, sink=3, window=20, last=90, decode_full=True)
    assert torch.equal(out, attention(q, k, v, **HOW))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    q, k, v = random_qkv(2, 4, 2, 200, 32, 16, dtype=dtype)
    sinks = torch.linspace(-2, 2, 4).to(dtype)
    options = {**SIZES, "scale": 32**-0.5, "layer": 0, "sink_logits": sinks}
    out = triangle(q, k, v, prompts(150, 200), **options)
    assert out.dtype == dtype
    assert_close(out, reference(q.float(), k.float(), v.float(), prompts(150, 200), **options))


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, k, v = (layouts(x)[layout] for x in random_qkv(2, 4, 2, 90, 8))
    agrees(q, k, v, prompts(60, 90), **SIZES)
    assert triangle(q, k, v, prompts(60, 90), **HOW, **SIZES).is_contiguous()


def test_a_request_does_not_see_its_batch():
    q, k, v = random_qkv(3, 6, 2, 140, 16)
    lengths = prompts(140, 70, 1)
    out = triangle(q, k, v, lengths, **HOW, **SIZES)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(triangle(q[one], k[one], v[one], lengths[one], **HOW, **SIZES), out[one])


def test_every_row_is_written():
    q, k, v = random_qkv(2, 4, 2, 150, 8)
    with PoisonedMemory():
        out = op.run(q, k, v, prompts(100, 150), **HOW, **SIZES)
    assert out.isfinite().all()


def test_memory_is_linear_in_both_directions():
    rows = 2048
    q, k, v = random_qkv(1, 2, 1, rows, 8)
    options = {**HOW, "sink": 8, "window": 64, "last": 32}
    with LargestAllocation() as seen:
        op.row_call(q, k, v, prompts(rows), **options).forward()
        gradients(lambda q, k, v: triangle(q, k, v, prompts(rows), **options), q, k, v)
    assert seen.bytes < rows * rows * 4 / 16


@pytest.mark.parametrize("decode_full", [False, True])
def test_gradcheck(decode_full):
    q, k, v = random_qkv(2, 4, 2, 13, 4, 3, dtype=torch.float64, requires_grad=True)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    sizes = {"sink": 2, "window": 3, "last": 2, "decode_full": decode_full}

    def run(q, k, v, sinks):
        return triangle(q, k, v, prompts(9, 13), **HOW, **sizes, sink_logits=sinks)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    q, k, v = random_qkv(2, 4, 2, 40, 8, 6, requires_grad=grad)
    torch.library.opcheck(triangle.default, (q, k, v, prompts(30, 40)), {**HOW, **SIZES})


BAD = {
    "negative last": ({"last": -1}, prompts(6, 6), "last is -1"),
    "no window": ({"window": 0}, prompts(6, 6), "window is 0"),
    "prompts of another batch": ({}, prompts(6), r"prompt_lens must be \[2\], is \(1,\)"),
    "a prompt longer than the rows": ({}, prompts(6, 7), r"prompt_lens must lie in 0..6, found 6..7"),
    "prompts not integers": ({}, torch.ones(2), "prompt_lens must be int64"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("changes", "lengths", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, lengths, message, grad):
    q, k, v = random_qkv(2, 4, 2, 6, 8, requires_grad=grad)
    with pytest.raises(UserError, match=f"fluxc::triangle_attention: .*{message}"):
        triangle(q, k, v, lengths, **HOW, **SIZES | changes)
