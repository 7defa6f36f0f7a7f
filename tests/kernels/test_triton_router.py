"""The Triton router kernels against plain fp64. See test_triton_attention.py for how they run without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = 1e-5  # fp32 sums of a few thousand terms, in another order


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


def pooled(q, lens, pool):
    parts = []
    for b, n in enumerate(lens.tolist()):
        rows = [*range(min(pool, n)), *range(max(0, n - pool), n)]
        parts.append(q[b, :, rows].double().mean((0, 1)))
    return torch.stack(parts)


def weights(width):
    sizes = [(8 * width, width), (2 * width, 8 * width), (4 * width, 2 * width), (width, 4 * width), (2, width)]
    made = []
    for shape in sizes:
        made += [torch.randn(shape, device=DEVICE) * shape[1] ** -0.5, torch.randn(shape[0], device=DEVICE)]
    return made


def logits(x, w):
    silu = torch.nn.functional.silu
    w0, b0, w1, b1, w2, b2, w3, b3, w4, b4 = (t.double() for t in w)
    x = silu(x @ w0.T + b0) @ w1.T + b1
    return silu(silu(x @ w2.T + b2) @ w3.T + b3) @ w4.T + b4


def close(actual, wanted):
    error = ((actual.double() - wanted).norm() / wanted.norm()).item()
    assert error < TOLERANCE, error
    return True


def queries(heads, rows, width):
    lens = torch.tensor([rows, 1, 2, rows // 2] if GPU else [rows, 1], device=DEVICE)
    return torch.randn(len(lens), rows, heads, width, device=DEVICE).half().transpose(1, 2), lens


@here
@pytest.mark.parametrize(("heads", "width", "pool"), [(4, 64, 100), (9, 64, 7), (3, 80, 10), (2, 128, 60)])
def test_pool(heads, width, pool):
    from fluxc.kernels.router_pool import triton_impl

    q, lens = queries(heads, 150, width)
    assert triton_impl.supported(q, lens, pool=pool) is None
    assert close(triton_impl.forward(q, lens, pool=pool), pooled(q, lens, pool))


@here
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_fused_router(width, fused):
    from fluxc.kernels import triton_router

    if fused and not GPU:
        pytest.skip("the interpreter runs programs one after the other: they cannot wait for each other")
    q, lens = queries(2, 40, width)
    w = weights(width)
    assert triton_router.unsupported(q, *w) is None
    wanted = logits(pooled(q, lens, 9), w)
    for _ in range(3 if GPU else 1):
        assert close(triton_router.router(q, lens, *w, pool=9, fused=fused), wanted)


@here
def test_refusals_name_the_reason():
    from fluxc.kernels import triton_router

    q, _ = queries(2, 40, 64)
    assert "contiguous" in triton_router.unsupported(q.transpose(2, 3))
    assert "float64" in triton_router.unsupported(q.double())
    assert "fp32" in triton_router.unsupported(q, *[w.half() for w in weights(64)])
    assert "multiple" in triton_router.unsupported(q[..., :60], *weights(60))
