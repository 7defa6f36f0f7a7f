"""The Triton gradients against autograd in fp64. See test_triton_attention.py for how they run without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
# ds is rounded to the operands' dtype before its product: a few times the forward's error.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if GPU else [torch.float16, torch.float32]
TILE = 128 if GPU else 16
ROWS = 4 * TILE + 5 if GPU else 3 * TILE + 5


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


def visible(rows, sink, window, dense):
    i, j = torch.arange(rows, device=DEVICE)[:, None], torch.arange(rows, device=DEVICE)[None, :]
    near = (j < sink) | (i - j < window) if window else j <= i
    return (j <= i) & (near | ((i >= dense[0]) & (i < dense[1])))


def check(call, seen, dtype, heads=2, kv_heads=1, width=None, batch=1, rows=ROWS):
    """Gradients of random operands under the mask seen [B,S,S] against fp64 autograd."""
    from fluxc.kernels.triton_backward import gradients, unsupported
    from fluxc.kernels.triton_launch import attend_with_lse

    width = width or (64 if GPU else 16)
    q, k, v = (
        torch.randn(batch, rows, n, width, device=DEVICE).to(dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads)
    )
    grad = torch.randn(batch, rows, heads, width, device=DEVICE).to(dtype)
    assert unsupported(q, k, v, call) is None
    out, lse = attend_with_lse(q, k, v, call)
    found = gradients(q, k, v, out, lse, grad, call)
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    repeated = [x.repeat_interleave(heads // kv_heads, 1) for x in leaves[1:]]
    s = (leaves[0] @ repeated[0].transpose(2, 3) * call.scale).masked_fill(~seen[:, None], float("-inf"))
    wanted = torch.autograd.grad((torch.softmax(s, 3) @ repeated[1]).transpose(1, 2), leaves, grad.double())
    for name, mine, reference in zip("qkv", found, wanted, strict=True):
        # A row that sees one key has no gradient in q and k: there the output gradient is the measure.
        size = max(reference.norm(), 0.1 * grad.double().norm())
        error = ((mine.double() - reference).norm() / size).item()
        assert error < TOLERANCE[dtype], (name, error)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full(dtype):
    from fluxc.kernels.triton_launch import Call

    check(Call(0.3), visible(ROWS, 0, 0, (0, 0))[None], dtype)


@here
@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:1], ids=str)
@pytest.mark.parametrize(("sink", "window"), [(0, 1), (3, TILE), (TILE + 2, 2 * TILE), (2 * TILE, 3), (1, 5 * TILE)])
def test_streaming(sink, window, dtype):
    from fluxc.kernels.triton_launch import Call

    check(Call(0.3, sink, window), visible(ROWS, sink, window, (0, 0))[None], dtype)


@here
@pytest.mark.parametrize("decode_full", [False, True])
@pytest.mark.parametrize("last", [0, 7, 1000] if GPU else [7])
def test_triangle(last, decode_full):
    from fluxc.kernels.triton_launch import Call

    lens = [2 * TILE - 2, ROWS]
    call = Call(0.3, 2, TILE, last, decode_full, torch.tensor(lens, device=DEVICE))
    dense = [(max(0, n - last), ROWS if decode_full else n) for n in lens]
    check(call, torch.stack([visible(ROWS, 2, TILE, d) for d in dense]), torch.float16, batch=2)


@here
def test_routed():
    from fluxc.kernels.triton_launch import Call

    call = Call(0.3, 2, TILE, route=torch.tensor([True, False], device=DEVICE))
    seen = torch.stack([visible(ROWS, 2, TILE, (0, ROWS)), visible(ROWS, 2, TILE, (0, 0))])
    check(call, seen, torch.float16, batch=2)


@here
@pytest.mark.parametrize(("width", "rows"), [(80, TILE), (128, TILE + 1), (64, 1)])
def test_head_dims_and_short_sequences(width, rows):
    from fluxc.kernels.triton_launch import Call

    seen = visible(rows, 1, 5, (0, 0))[None]
    check(Call(width**-0.5, 1, 5), seen, torch.float16, 3, 3, width, rows=rows)


@here
def test_refusals_name_the_reason():
    from fluxc.kernels.triton_backward import unsupported
    from fluxc.kernels.triton_launch import Call

    q, k = torch.randn(1, 2, 8, 16, device=DEVICE), torch.randn(1, 2, 9, 16, device=DEVICE)
    assert "soft cap" in unsupported(q, q, q, Call(0.3, softcap=1.0))
    assert "keys" in unsupported(q, k, k, Call(0.3))
    assert "scale" in unsupported(q, q, q, Call(-1.0))
