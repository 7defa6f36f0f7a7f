"""`fluxc::attention` against its dense reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.attention import op
from fluxc.kernels.attention.reference import attention as reference
from fluxc.kernels.band import CHUNK_TOKENS
from fluxc.testing import (
    GRADIENT_FACTOR,
    TOLERANCES,
    LargestAllocation,
    PoisonedMemory,
    assert_close,
    gradients,
    layouts,
    random_qkv,
)

kernels.register()
attention = torch.ops.fluxc.attention
HOW = {"scale": 0.3, "layer": 0}
FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0},
    "window and softcap": {"window": 40, "softcap": 2.0},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wide(*tensors):
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


@pytest.mark.parametrize("rows", [1, 2, 3, 127, 128, 129, 300])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_equals_the_reference(rows, heads, features):
    q, k, v = random_qkv(2, *heads, rows, 16)
    assert_close(attention(q, k, v, **HOW, **features), reference(q, k, v, **HOW, **features))


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_window_at_the_edges_of_chunks(extra):
    q, k, v = random_qkv(1, 2, 2, 300 + 3 * CHUNK_TOKENS + extra, 8)
    assert_close(attention(q, k, v, **HOW, window=300), reference(q, k, v, **HOW, window=300))


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 64, 99, 100, 101, 1000])
def test_every_size_of_window(window):
    q, k, v = random_qkv(1, 2, 1, 100, 8)
    assert_close(attention(q, k, v, **HOW, window=window), reference(q, k, v, **HOW, window=window))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_every_dtype(dtype, features):
    q, k, v = random_qkv(2, 4, 2, 200, 32, dtype=dtype)
    sinks = torch.linspace(-2, 2, 4).to(dtype)
    out = attention(q, k, v, scale=32**-0.5, layer=0, sink_logits=sinks, **features)
    assert out.dtype == dtype
    assert_close(out, reference(*wide(q, k, v), scale=32**-0.5, layer=0, sink_logits=sinks, **features))


@pytest.mark.parametrize("widths", [(8, 8), (8, 24), (24, 8), (1, 1)])
def test_widths_of_keys_and_values(widths):
    q, k, v = random_qkv(2, 4, 2, 33, *widths)
    out = attention(q, k, v, **HOW)
    assert out.shape == (2, 33, 4, widths[1])
    assert out.is_contiguous()
    assert_close(out, reference(q, k, v, **HOW))


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_sink_logits_take_weight(features):
    q, k, v = random_qkv(2, 4, 2, 70, 8)
    sinks = torch.tensor([-100.0, 0.0, 1.0, 5.0])
    out = attention(q, k, v, **HOW, **features, sink_logits=sinks)
    assert_close(out, reference(q, k, v, **HOW, **features, sink_logits=sinks))
    assert_close(out[:, :, 0], attention(q, k, v, **HOW, **features)[:, :, 0])
    assert (out[:, 0, 3].abs() < attention(q, k, v, **HOW)[:, 0, 3].abs()).all()


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("start", [[0, 1], [3, 40], [90, 77]])
def test_query_offset(features, start):
    q, k, v = random_qkv(2, 4, 2, 10, 8, T=100)
    start = torch.tensor(start)
    assert_close(
        attention(q, k, v, **HOW, **features, q_start=start), reference(q, k, v, **HOW, **features, q_start=start)
    )


def test_offset_continues_the_whole():
    q, k, v = random_qkv(1, 4, 2, 90, 8)
    tail = attention(q[:, :, 50:], k, v, **HOW, window=20, q_start=torch.tensor([50]))
    assert_close(tail, attention(q, k, v, **HOW, window=20)[:, 50:])


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, k, v = (layouts(x)[layout] for x in random_qkv(2, 4, 2, 50, 8))
    for features in FEATURES.values():
        out = attention(q, k, v, **HOW, **features)
        assert out.is_contiguous()
        assert_close(out, reference(q, k, v, **HOW, **features))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_does_not_see_its_batch(dtype):
    q, k, v = random_qkv(3, 6, 2, 140, 16, dtype=dtype)
    out = attention(q, k, v, **HOW, window=60)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(attention(q[one], k[one], v[one], **HOW, window=60), out[one])


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_every_row_is_written(features):
    q, k, v = random_qkv(2, 4, 2, 150, 8)
    with PoisonedMemory():
        out = op.run(q, k, v, **HOW, **features)
    assert out.isfinite().all()


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_memory_is_linear(features):
    def largest(rows):
        q, k, v = random_qkv(1, 2, 1, rows, 8)
        with LargestAllocation() as forward:
            op.row_call(q, k, v, **HOW, **features).forward()
        with LargestAllocation() as backward:
            gradients(lambda q, k, v: attention(q, k, v, **HOW, **features), q, k, v)
        return max(forward.bytes, backward.bytes)

    # Twice, and a little more: the first rows of a window are no band.
    assert largest(2048) < 2.2 * largest(1024)
    assert largest(2048) < 2048 * 2048 * 4 / 2


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("rows", [1, 9])
def test_gradcheck(features, rows):
    q, k, v = random_qkv(2, 4, 2, rows, 4, 3, dtype=torch.float64, requires_grad=True)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()

    def run(q, k, v, sinks):
        return attention(q, k, v, **HOW, **features, sink_logits=sinks)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_gradients_equal_the_reference(features, dtype):
    inputs = (*random_qkv(2, 4, 2, 300, 8, dtype=dtype), torch.linspace(-1, 1, 4).to(dtype))

    def call(run):
        return lambda q, k, v, sinks: run(q, k, v, **HOW, **features, sink_logits=sinks)

    actual = gradients(call(attention), *inputs)
    expected = gradients(call(reference), *wide(*inputs))
    assert [x.dtype for x in actual] == [dtype] * 4
    for a, e in zip(actual[:3], expected[:3], strict=True):
        assert_close(a, e, factor=GRADIENT_FACTOR)
    # A sink's gradient sums over all rows of both requests.
    assert_close(actual[3], expected[3], factor=GRADIENT_FACTOR * 600**0.5)


def test_only_what_asks_gets_a_gradient():
    q, k, v = random_qkv(1, 2, 1, 5, 4)
    assert not attention(q, k, v, **HOW).requires_grad
    v.requires_grad_()
    attention(q, k, v, **HOW).sum().backward()
    assert v.grad.shape == v.shape
    assert q.grad is None
    with torch.no_grad():
        assert not attention(q, k, v, **HOW).requires_grad


def test_the_tape_changes_no_bit():
    q, k, v = random_qkv(2, 4, 2, 130, 8)
    taped = attention(q.clone().requires_grad_(), k, v, **HOW, window=50)
    assert torch.equal(taped.detach(), attention(q, k, v, **HOW, window=50))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_opcheck(features, grad):
    q, k, v = random_qkv(2, 4, 2, 20, 8, 6, requires_grad=grad)
    sinks = torch.zeros(4, requires_grad=grad)
    torch.library.opcheck(attention.default, (q, k, v), {**HOW, **features, "sink_logits": sinks})


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 8)

    def forward(self, q, k, v):
        return attention(self.project(q), k, v, **HOW, window=4).flatten(2) * 2


@pytest.mark.parametrize("grad", [False, True])
def test_exports_with_any_batch_and_length(grad):
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    module = Attends().requires_grad_(grad)
    program = torch.export.export(module, random_qkv(2, 4, 2, 6, 8), dynamic_shapes=({0: batch, 2: rows},) * 3)
    assert [r.lower for r in program.range_constraints.values()] == [1, 1]
    for shape in ((1, 1), (1, 6), (3, 5), (2, 1)):
        q, k, v = random_qkv(shape[0], 4, 2, shape[1], 8)
        assert torch.equal(program.module()(q, k, v), module(q, k, v))


def bad(**changes):
    q, k, v = random_qkv(2, 4, 2, 6, 8)
    given = {"q": q, "k": k, "v": v, **HOW} | changes
    return given.pop("q"), given.pop("k"), given.pop("v"), given


BAD = {
    "k has another dtype": ({"k": torch.zeros(2, 2, 6, 8, dtype=torch.float16)}, "k is torch.float16"),
    "heads do not divide": ({"q": torch.zeros(2, 3, 6, 8)}, "q has 3 heads, no multiple of k's 2"),
    "no rows": ({"q": torch.zeros(2, 4, 0, 8)}, "q is empty"),
    "another batch": ({"q": torch.zeros(1, 4, 6, 8)}, "k has batch 2, q has 1"),
    "widths differ": ({"q": torch.zeros(2, 4, 6, 9)}, "k has width 8, q has 9"),
    "values of other keys": ({"v": torch.zeros(2, 2, 5, 8)}, r"v is \(2, 2, 5, 8\)"),
    "too few keys": ({"q": torch.zeros(2, 4, 7, 8)}, "k has 6 keys for 7 queries"),
    "three axes": ({"q": torch.zeros(4, 6, 8)}, "q has 3 axes"),
    "integers": ({n: torch.zeros(2, 2, 6, 8, dtype=torch.int64) for n in "qkv"}, "q is torch.int64"),
    "negative window": ({"window": -1}, "window is -1"),
    "negative soft cap": ({"softcap": -1.0}, "softcap is -1.0"),
    "sinks of other heads": ({"sink_logits": torch.zeros(2)}, r"sink_logits must be \[4\], is \(2,\)"),
    "offset past the keys": ({"q_start": torch.tensor([0, 1])}, "q_start must lie in 0..0 for 6 of 6 keys, found 0..1"),
    "negative offset": ({"q_start": torch.tensor([-1, 0])}, "found -1..0"),
    "offset of another batch": ({"q_start": torch.tensor([0])}, r"q_start must be \[2\]"),
    "offset not an integer": ({"q_start": torch.zeros(2)}, "q_start must be int64"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message, grad):
    q, k, v, options = bad(**changes)
    if grad and q.is_floating_point():
        q.requires_grad_()
    with pytest.raises(UserError, match=f"fluxc::attention: .*{message}"):
        attention(q, k, v, **options)


def test_tolerances_order_by_precision():
    limits = [TOLERANCES[kind]["atol"] for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert limits == sorted(set(limits))
