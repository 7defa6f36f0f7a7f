"""The ops on CUDA tensors, by whichever provider takes the call, and by flash pieces, against the references."""

import pytest
import torch

from fluxc import kernels
from fluxc.kernels import registry
from fluxc.kernels.attention.reference import attention as full_reference
from fluxc.kernels.kv_write.reference import kv_write as write_reference
from fluxc.kernels.routed_attention.reference import routed_attention as routed_reference
from fluxc.kernels.router_pool.reference import router_pool as pool_reference
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.streaming_attention.reference import streaming_attention as streaming_reference
from fluxc.kernels.triangle_attention.reference import triangle_attention as triangle_reference
from fluxc.testing import GRADIENT_FACTOR, assert_close, gradients, random_qkv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
kernels.register()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HOW = {"scale": 0.125, "layer": 0}
SIZES = {"sink": 16, "window": 100}
PROMPTS = (300, 211)
CASES = {
    "attention": ("attention", full_reference, {}),
    "window": ("attention", full_reference, {"window": 100}),
    "softcap": ("attention", full_reference, {"softcap": 5.0}),
    "streaming": ("streaming_attention", streaming_reference, SIZES),
    "triangle": ("triangle_attention", triangle_reference, {**SIZES, "last": 40}),
    "routed": ("routed_attention", routed_reference, {**SIZES, "last": 40, "kind": "streaming"}),
}


def operands(op, dtype):
    q, k, v = (x.cuda() for x in random_qkv(2, 8, 2, 300, 64, dtype=dtype))
    extra = {"triangle_attention": [torch.tensor(PROMPTS)]}
    extra["routed_attention"] = [torch.tensor([True, False]), torch.tensor(PROMPTS)]
    return q, k, v, *(x.cuda() for x in extra.get(op, []))


def wide(x):
    return x.float() if x.is_floating_point() else x


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "reference", "options"), CASES.values(), ids=CASES)
def test_equals_the_reference(op, reference, options, dtype):
    inputs = operands(op, dtype)
    out = getattr(torch.ops.fluxc, op)(*inputs, **HOW, **options)
    assert out.is_contiguous()
    assert_close(out, reference(*map(wide, inputs), **HOW, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["attention", "streaming_attention", "triangle_attention"])
def test_pieces_equal_the_reference(op, dtype):
    _, reference, options = next(case for case in CASES.values() if case[0] == op)
    inputs = operands(op, dtype)
    pieces = next(p for p in registry.providers(op) if p.name == "pieces")
    assert_close(pieces.run(*inputs, **HOW, **options), reference(*map(wide, inputs), **HOW, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "reference", "options"), CASES.values(), ids=CASES)
def test_gradients_equal_the_reference(op, reference, options, dtype):
    q, k, v, *rest = operands(op, dtype)

    def call(run):
        return lambda q, k, v: run(q, k, v, *rest, **HOW, **options).cpu()

    actual = gradients(call(getattr(torch.ops.fluxc, op)), q, k, v)
    expected = gradients(call(reference), *map(wide, (q, k, v)))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, factor=GRADIENT_FACTOR * 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_full_is_attention_bit_for_bit(dtype):
    q, k, v, _, prompts = operands("routed_attention", dtype)
    full = torch.ones(2, dtype=torch.bool, device="cuda")
    out = torch.ops.fluxc.routed_attention(q, k, v, full, prompts, **HOW, **SIZES, last=0, kind="streaming")
    assert torch.equal(out, torch.ops.fluxc.attention(q, k, v, **HOW))


@pytest.mark.parametrize("dtype", DTYPES)
def test_router_pool(dtype):
    q, prompts = operands("attention", dtype)[0], torch.tensor(PROMPTS).cuda()
    assert_close(torch.ops.fluxc.router_pool(q, prompts, pool=100), pool_reference(q.float(), prompts, pool=100))


def test_kv_write():
    k, v = random_qkv(2, 2, 2, 50, 64)[1:]
    slots = torch.randperm(3 * PAGE)[:100].view(2, 50)
    slots[0, ::7] = -1
    expected = torch.zeros(3, 2, 2, PAGE, 64)
    actual = expected.cuda()
    write_reference(expected, k, v, slots)
    torch.ops.fluxc.kv_write(actual, k.cuda(), v.cuda(), slots.cuda())
    assert torch.equal(actual.cpu(), expected)
