"""The ops as models call them, served by Triton: parity with the references, gradients, and no read on the host.

See test_triton_attention.py for how this runs without a GPU.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

from fluxc import kernels
from fluxc.kernels import registry
from fluxc.kernels.append_attention.reference import append_attention as append_reference
from fluxc.kernels.attention.reference import attention as full_reference
from fluxc.kernels.decode_attention.reference import decode_attention as decode_reference
from fluxc.kernels.kv_write.reference import kv_write as write_reference
from fluxc.kernels.routed_attention.reference import routed_attention as routed_reference
from fluxc.kernels.router.reference import router as router_reference
from fluxc.kernels.router_pool.reference import router_pool as pool_reference
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.streaming_attention.reference import streaming_attention as streaming_reference
from fluxc.kernels.triangle_attention.reference import triangle_attention as triangle_reference
from fluxc.testing import GRADIENT_FACTOR, assert_close, gradients, random_qkv

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
# In the interpreter, which is slow, the kernels' own tests see to the dtypes.
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if GPU else [torch.float32]
HOW = {"scale": 0.25, "layer": 0}
ROWS, WIDTH, HEADS = (300, 64, (4, 2)) if GPU else (40, 16, (2, 1))
SIZES = {"sink": 5, "window": ROWS // 3}
PROMPTS, ROUTES = torch.tensor([ROWS, ROWS // 2]), torch.tensor([True, False])
SPARSE = {**SIZES, "last": 10}
CASES = {
    "attention": ("attention", full_reference, [], {}),
    "window": ("attention", full_reference, [], {"window": 20}),
    "softcap": ("attention", full_reference, [], {"softcap": 5.0}),
    "streaming": ("streaming_attention", streaming_reference, [], SIZES),
    "triangle": ("triangle_attention", triangle_reference, [PROMPTS], SPARSE),
    "decode full": ("triangle_attention", triangle_reference, [PROMPTS], SPARSE | {"decode_full": True}),
    "routed": ("routed_attention", routed_reference, [ROUTES, PROMPTS], SPARSE | {"kind": "streaming"}),
    "routed triangle": ("routed_attention", routed_reference, [ROUTES, PROMPTS], SPARSE | {"kind": "triangle"}),
}
RINGS = [(0, 0), (5, 40), (0, 40), (5, 40)]
STARTS = [70, 130, 60, 3]


@pytest.mark.skipif(INTERPRET or GPU, reason="this is the process with the interpreter or the GPU")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


@contextlib.contextmanager
def unread():
    """Inside, a read of a device value on the host raises. The interpreter has no device to wait for."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def defined():
    kernels.register()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


def wide(tensors):
    return [x.float().cpu() if x.is_floating_point() else x.cpu() for x in tensors]


def call(op, *args, **options):
    """The op after a first call that compiles, with no read on the host; checks that Triton serves it."""
    provider = next(p for p in registry.providers(op) if p.supported(*args, **options) is None)
    assert provider.name == "triton", provider.name
    run = getattr(torch.ops.fluxc, op)
    if GPU:
        run(*args, **options)
    with unread():
        return run(*args, **options)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "reference", "rest", "options"), CASES.values(), ids=CASES)
def test_attention_ops(op, reference, rest, options, dtype):
    if GPU and op == "attention" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("SDPA is preferred here")
    tensors = on_device(*random_qkv(2, *HEADS, ROWS, WIDTH, dtype=dtype), *rest)
    out = call(op, *tensors, **HOW, **options)
    assert_close(out.cpu(), reference(*wide(tensors), **HOW, **options))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_full_is_attention_bit_for_bit(dtype):
    q, k, v = on_device(*random_qkv(2, *HEADS, ROWS, WIDTH, dtype=dtype))
    full, prompts = on_device(torch.tensor([True, True]), PROMPTS)
    out = torch.ops.fluxc.routed_attention(q, k, v, full, prompts, **HOW, **SPARSE, kind="triangle")
    assert torch.equal(out, torch.ops.fluxc.attention(q, k, v, **HOW))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES if GPU else ["attention", "softcap", "routed triangle"])
def test_gradients(case, dtype):
    op, reference, rest, options = CASES[case]
    inputs, rest = on_device(*random_qkv(2, *HEADS, ROWS, WIDTH, dtype=dtype)), on_device(*rest)
    run = getattr(torch.ops.fluxc, op)
    actual = gradients(lambda *x: run(*x, *rest, **HOW, **options).cpu(), *inputs)
    expected = gradients(lambda *x: reference(*x, *wide(rest), **HOW, **options), *wide(inputs))
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.cpu(), e, factor=GRADIENT_FACTOR * 10)


@here
@pytest.mark.parametrize("op", ["streaming_attention", "routed_attention"])
def test_gradients_come_from_triton_without_a_read(op, monkeypatch):
    from fluxc.kernels import rows, triton_backward

    monkeypatch.setattr(rows, "flash_backward", lambda *a, **k: pytest.fail("pieces"))
    served, kernel = [], triton_backward.gradients
    monkeypatch.setattr(triton_backward, "gradients", lambda *a: served.append(a) or kernel(*a))
    _, _, rest, options = CASES["streaming" if op == "streaming_attention" else "routed"]
    q, k, v, *rest = on_device(*random_qkv(2, *HEADS, ROWS, WIDTH), *rest)
    q.requires_grad_()
    for context in (contextlib.nullcontext(), unread()) if GPU else (unread(),):
        with context:
            getattr(torch.ops.fluxc, op)(q, k, v, *rest, **HOW, **options).sum().backward()
    assert served


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_router_pool_and_its_gradient(dtype):
    q, lens = on_device(random_qkv(2, *HEADS, ROWS, WIDTH, dtype=dtype)[0], PROMPTS)
    assert_close(call("router_pool", q, lens, pool=9).cpu(), pool_reference(*wide([q, lens]), pool=9))
    leaf = q.float().detach().clone().requires_grad_()
    torch.ops.fluxc.router_pool(leaf, lens, pool=9).sum().backward()
    expected = q.float().cpu().requires_grad_()
    pool_reference(expected, lens.cpu(), pool=9).sum().backward()
    assert_close(leaf.grad.cpu(), expected.grad)


@here
def test_a_length_outside_the_prompt_is_not_a_number():
    q, lens = on_device(random_qkv(3, *HEADS, ROWS, WIDTH)[0], torch.tensor([ROWS + 1, 0, ROWS]))
    from fluxc.kernels import triton_router

    out = triton_router.router_pool(q, lens, pool=9)
    assert out[:2].isnan().all()
    assert out[2].isfinite().all()


@here
def test_router():
    from fluxc.router import LayerRouter, RouterSpec

    weights = on_device(*(p.detach() for p in LayerRouter(RouterSpec(width=64, pool=9)).parameters()))
    q, lens = on_device(random_qkv(2, 4, 2, 60, 64, dtype=torch.float16)[0], torch.tensor([60, 30]))
    out = call("router", q, lens, *weights, pool=9)
    assert_close(out.cpu(), router_reference(*wide([q, lens, *weights]), pool=9))


def filled(dtype, kv_heads=2):
    """A cache of requests that are full layers and rings, at STARTS: cache, page_table, lens."""
    pages = -(-max(STARTS) // PAGE)
    table = torch.randperm(len(STARTS) * pages, generator=torch.Generator().manual_seed(1)).view(-1, pages).int()
    cache = torch.full((table.numel(), 2, kv_heads, PAGE, WIDTH), torch.nan, dtype=dtype)
    lens = [n if w == 0 else min(n, s + w) for n, (s, w) in zip(STARTS, RINGS, strict=True)]
    for b, n in enumerate(lens):
        for slot in range(n):
            cache[table[b, slot // PAGE], :, :, slot % PAGE] = torch.randn(2, kv_heads, WIDTH).to(dtype)
    return on_device(cache, table, torch.tensor(lens, dtype=torch.int32))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [{}, {"softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 4)}])
def test_decode(dtype, features):
    (q,) = on_device(torch.randn(4, 4, WIDTH).to(dtype))
    features = {name: x.to(DEVICE) if torch.is_tensor(x) else x for name, x in features.items()}
    args = (q, *filled(dtype))
    out = call("decode_attention", *args, **HOW, **features)
    features = {name: x.cpu() if torch.is_tensor(x) else x for name, x in features.items()}
    assert_close(out.cpu(), decode_reference(*wide(args), **HOW, **features))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turn", [1, 39, 40, 41, 120] if GPU else [1, 41])
def test_append(turn, dtype):
    q, k, v = random_qkv(4, 4, 2, turn, WIDTH, dtype=dtype)
    rings, starts = torch.tensor(RINGS), torch.tensor(STARTS)
    args = (*on_device(q, k, v), *filled(dtype), *on_device(starts, rings[:, 0].clone(), rings[:, 1].clone()))
    out = call("append_attention", *args, **HOW)
    assert_close(out.cpu(), append_reference(*wide(args), **HOW))


@here
def test_append_with_soft_cap_and_sink_logits():
    options = {**HOW, "softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 4)}
    rings, starts = torch.tensor(RINGS), torch.tensor(STARTS)
    q, k, v = on_device(*random_qkv(4, 4, 2, 21, WIDTH))
    args = (q, k, v, *filled(torch.float32), *on_device(starts, rings[:, 0].clone(), rings[:, 1].clone()))
    on = options | {"sink_logits": options["sink_logits"].to(DEVICE)}
    assert_close(call("append_attention", *args, **on).cpu(), append_reference(*wide(args), **options))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("turn", [1, 300] if GPU else [1, 21])
def test_append_in_parts(turn, parts, dtype):
    """Programs that share the pages of a tile, more than there are pages in some; three query heads of a key head."""
    from fluxc.kernels import triton_append

    q, k, v = random_qkv(4, 6, 2, turn, WIDTH, dtype=dtype)
    rings, starts, sinks = torch.tensor(RINGS), torch.tensor(STARTS), torch.linspace(-1, 1, 6)
    args = (*on_device(q, k, v), *filled(dtype), *on_device(starts, rings[:, 0].clone(), rings[:, 1].clone()))
    how = {"scale": 0.25, "softcap": 3.0}
    out = triton_append.append_attention(*args, **how, sink_logits=sinks.to(DEVICE), parts=parts)
    assert_close(out.cpu(), append_reference(*wide(args), **how, layer=0, sink_logits=sinks))


@here
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("bad", ["lens", "page"])
def test_what_lies_outside_the_cache_is_not_read_and_not_a_number(bad, parts):
    from fluxc.kernels import triton_append, triton_decode

    cache, table, lens = filled(torch.float32)
    if bad == "lens":
        lens[1] = table.shape[1] * PAGE + 1
    else:
        table[1, 0] = len(cache)
    q, k, v = on_device(*random_qkv(4, 4, 2, 3, WIDTH))
    zero = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    decoded = triton_decode.decode_attention(q[:, :, 0], cache, table, lens, scale=0.2)
    how = {"scale": 0.2, "parts": parts}
    appended = triton_append.append_attention(q, k, v, cache, table, lens, lens.long(), zero, zero, **how)
    for out in (decoded, appended):
        assert out[1].isnan().all()
        assert out[[0, 2, 3]].isfinite().all()


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kv_write(dtype):
    k, v = random_qkv(2, 3, 3, 20, WIDTH, dtype=dtype)[1:]
    slots = torch.randperm(3 * PAGE)[:40].view(2, 20)
    slots[0, ::3] = -1
    expected = torch.zeros(3, 2, 3, PAGE, WIDTH, dtype=dtype)
    write_reference(expected, k, v, slots)
    actual = torch.zeros_like(expected).to(DEVICE)
    call("kv_write", actual, *on_device(k, v, slots))
    assert torch.equal(actual.cpu(), expected)
