"""The fused ops by Triton. See test_triton_attention.py for how they run without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from fluxc import kernels
from fluxc.kernels import registry
from fluxc.kernels.add_rms_norm.reference import add_rms_norm as norm_reference
from fluxc.kernels.qk_norm_rope_cache.reference import qk_norm_rope_cache as qkv_reference
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.swiglu.reference import swiglu as swiglu_reference
from fluxc.testing import assert_close, random_qkv

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if GPU else [torch.float16, torch.float32]


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


def call(op, *args, **options):
    """The op, with no read on the host once it is compiled; checks that Triton serves it."""
    kernels.register()
    provider = next(p for p in registry.providers(op) if p.supported(*args, **options) is None)
    assert provider.name == "triton"
    run = getattr(torch.ops.fluxc, op)
    if not GPU:
        return run(*args, **options)
    run(*args, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run(*args, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made(*shape, dtype):
    return torch.randn(shape).to(dtype).to(DEVICE)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 576), (3, 4096)])
def test_add_rms_norm(shape, dtype):
    x, residual, weight = made(*shape, dtype=dtype), made(*shape, dtype=dtype), made(shape[-1], dtype=dtype)
    found = call("add_rms_norm", x, residual, weight, eps=1e-5)
    for mine, wanted in zip(found, norm_reference(x, residual, weight, eps=1e-5), strict=True):
        assert_close(mine, wanted)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (2, 3, 1536), (3, 2000)])
def test_swiglu(shape, dtype):
    gate, up = made(*shape, dtype=dtype), made(*shape, dtype=dtype)
    assert_close(call("swiglu", gate, up), swiglu_reference(gate, up))
    gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    assert_close(call("swiglu", gate, up), swiglu_reference(gate, up))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "turning", "norm"), [(1, 64, 64, True), (50, 80, 32, True), (33, 16, 16, False)]
)
def test_qk_norm_rope_cache(rows, width, turning, norm, dtype):
    q, k, v = (x.to(DEVICE) for x in random_qkv(2, 4, 2, rows, width, dtype=dtype))
    weights = [torch.rand(width).to(dtype).to(DEVICE) if norm else None for _ in range(2)]
    angles = torch.rand(2, rows, turning // 2).repeat(1, 1, 2) * 6
    cos, sin = (x.to(dtype).to(DEVICE) for x in (angles.cos(), angles.sin()))
    slots = torch.randperm(2 * PAGE)[: 2 * rows].view(2, rows).clone()
    slots[0, ::3] = -1
    args = [q, k, v, *weights, cos, sin, torch.zeros(2, 2, 2, PAGE, width, dtype=dtype, device=DEVICE)]
    args += [slots.to(DEVICE), torch.tensor([rows, max(1, rows // 2)], device=DEVICE)]
    for pool in (0, 1, 17, 100):
        found = call("qk_norm_rope_cache", *args, eps=1e-6, pool=pool)
        given = [x.float().cpu() if x is not None and x.is_floating_point() else x for x in args]
        given = [x.cpu() if x is not None else x for x in given]
        given[7] = torch.zeros_like(given[7])
        wanted = qkv_reference(*given, eps=1e-6, pool=pool)
        for mine, theirs in zip((*found, args[7]), (*wanted, given[7]), strict=True):
            # The pool sums in fp32 what the norm rounded to the dtype.
            assert_close(mine.cpu().to(dtype), theirs)
