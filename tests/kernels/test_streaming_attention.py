"""`fluxc::streaming_attention` against its dense reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.band import CHUNK_TOKENS, GROUP_TOKENS
from fluxc.kernels.streaming_attention import op
from fluxc.kernels.streaming_attention.reference import streaming_attention as reference
from fluxc.testing import (
    GRADIENT_FACTOR,
    LargestAllocation,
    PoisonedMemory,
    assert_close,
    gradients,
    layouts,
    random_qkv,
)

kernels.register()
streaming = torch.ops.fluxc.streaming_attention
attention = torch.ops.fluxc.attention
HOW = {"scale": 0.3, "layer": 0}
SIZES = {"sink": 3, "window": 20}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def agrees(q, k, v, **options):
    assert_close(streaming(q, k, v, **HOW, **options), reference(q, k, v, **HOW, **options))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 22, 23, 24, 25, 54, 55, 56, 151])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_equals_the_reference(rows, heads):
    agrees(*random_qkv(2, *heads, rows, 16), **SIZES)


@pytest.mark.parametrize("sink", [0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("window", [1, 2, 33, 63, 64, 65, 200])
def test_every_size(sink, window):
    agrees(*random_qkv(1, 2, 1, 150, 8), sink=sink, window=window)


@pytest.mark.parametrize("chunks", [0, 1, 2])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("window", [255, 512])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_edges_of_chunks(chunks, extra, window, groups):
    rows = 64 + window + chunks * CHUNK_TOKENS + extra
    agrees(*random_qkv(1, groups, 1, rows, 8), sink=64, window=window)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_edges_of_groups(extra):
    agrees(*random_qkv(1, 1, 1, 40 + GROUP_TOKENS + extra, 4), sink=10, window=30)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 400),
    sink=st.integers(0, 80),
    window=st.integers(1, 300),
    start=st.integers(0, 60),
    spare=st.integers(0, 3),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_any_sizes(rows, sink, window, start, spare, softcap):
    q, k, v = random_qkv(1, 2, 1, rows, 4, T=start + rows + spare)
    agrees(q, k, v, sink=sink, window=window, softcap=softcap, q_start=torch.tensor([start]))


def test_a_window_over_everything_is_full_attention():
    q, k, v = random_qkv(2, 4, 2, 50, 8)
    assert torch.equal(streaming(q, k, v, **HOW, sink=0, window=50), attention(q, k, v, **HOW))
    assert torch.equal(streaming(q, k, v, **HOW, sink=30, window=20), attention(q, k, v, **HOW))


def test_without_sink_is_windowed_attention():
    q, k, v = random_qkv(2, 4, 2, 90, 8)
    assert torch.equal(streaming(q, k, v, **HOW, sink=0, window=17), attention(q, k, v, **HOW, window=17))


def test_hidden_keys_have_no_say():
    q, k, v = random_qkv(1, 2, 1, 120, 8)
    out = streaming(q, k, v, **HOW, **SIZES)
    k, v = k.clone(), v.clone()
    k[:, :, 3:60], v[:, :, 3:60] = 1e4, 1e4
    assert torch.equal(streaming(q, k, v, **HOW, **SIZES)[:, 80:], out[:, 80:])


def test_inputs_are_left_alone():
    q, k, v = random_qkv(2, 4, 2, 90, 8)
    copies = [x.clone() for x in (q, k, v)]
    streaming(q, k, v, **HOW, **SIZES)
    streaming(q.contiguous(), k.contiguous(), v.contiguous(), **HOW, **SIZES)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_every_dtype(dtype, softcap):
    q, k, v = random_qkv(2, 4, 2, 200, 32, 16, dtype=dtype)
    sinks = torch.linspace(-2, 2, 4).to(dtype)
    options = {**SIZES, "scale": 32**-0.5, "layer": 0, "softcap": softcap, "sink_logits": sinks}
    out = streaming(q, k, v, **options)
    assert out.dtype == dtype
    assert_close(out, reference(q.float(), k.float(), v.float(), **options))


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, k, v = (layouts(x)[layout] for x in random_qkv(2, 4, 2, 90, 8))
    agrees(q, k, v, **SIZES)
    assert streaming(q, k, v, **HOW, **SIZES).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_does_not_see_its_batch(dtype):
    q, k, v = random_qkv(3, 6, 2, 140, 16, dtype=dtype)
    out = streaming(q, k, v, **HOW, **SIZES)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(streaming(q[one], k[one], v[one], **HOW, **SIZES), out[one])


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_every_row_is_written(softcap):
    q, k, v = random_qkv(2, 4, 2, 150, 8)
    with PoisonedMemory():
        out = op.run(q, k, v, **HOW, **SIZES, softcap=softcap)
    assert out.isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_memory_is_linear_in_both_directions(softcap):
    def largest(rows):
        q, k, v = random_qkv(1, 2, 1, rows, 8)
        options = {**HOW, "sink": 8, "window": 64, "softcap": softcap}
        with LargestAllocation() as forward:
            op.row_call(q, k, v, **options).forward()
        with LargestAllocation() as backward:
            gradients(lambda q, k, v: streaming(q, k, v, **options), q, k, v)
        return max(forward.bytes, backward.bytes)

    # Twice, and a little more: the first sink + window rows are no band.
    assert largest(4096) < 2.2 * largest(2048)
    assert largest(4096) < 4096 * 4096 * 4 / 16


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sizes", [{"sink": 2, "window": 3}, {"sink": 0, "window": 1}, {"sink": 40, "window": 1}])
def test_gradcheck(sizes, softcap):
    q, k, v = random_qkv(1, 4, 2, 11, 4, 3, dtype=torch.float64, requires_grad=True)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()

    def run(q, k, v, sinks):
        return streaming(q, k, v, **HOW, **sizes, softcap=softcap, sink_logits=sinks)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_the_reference(dtype):
    inputs = random_qkv(2, 4, 2, 300, 8, 12, dtype=dtype)
    actual = gradients(lambda *x: streaming(*x, **HOW, **SIZES), *inputs)
    expected = gradients(lambda *x: reference(*x, **HOW, **SIZES), *(x.float() for x in inputs))
    for a, e in zip(actual, expected, strict=True):
        # The sink's keys are seen by every row of two heads.
        assert_close(a, e, factor=GRADIENT_FACTOR * 600**0.5 if dtype != torch.float32 else GRADIENT_FACTOR)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    q, k, v = random_qkv(2, 4, 2, 40, 8, 6, requires_grad=grad)
    options = {**HOW, **SIZES, "sink_logits": torch.zeros(4, requires_grad=grad)}
    torch.library.opcheck(streaming.default, (q, k, v), options)


BAD = {
    "negative sink": ({"sink": -1}, "sink is -1"),
    "negative window": ({"window": -3}, "window is -3"),
    "no window": ({"window": 0}, "window is 0, must be at least 1"),
    "sinks of other heads": ({"sink_logits": torch.zeros(3)}, r"sink_logits must be \[4\]"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message, grad):
    q, k, v = random_qkv(2, 4, 2, 6, 8, requires_grad=grad)
    with pytest.raises(UserError, match=f"fluxc::streaming_attention: .*{message}"):
        streaming(q, k, v, **HOW, **SIZES | changes)
