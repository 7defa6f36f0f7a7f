"""The Triton attention kernels against plain fp32 attention.

Without a GPU the kernels run in the Triton interpreter, which must be switched on before Triton is imported: one test
starts this file again in a process of its own. With a GPU the same tests run the compiled kernels.
"""

import os
import subprocess
import sys

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
# Relative error of the whole output: half of the dtype's epsilon for P, about as much again for the output.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if GPU else [torch.float16, torch.float32]
TILE = 128 if GPU else 16
WIDTH = 64 if GPU else 16
OPTIONS = {"layer": 3}


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


def inputs(batch, heads, kv_heads, rows, width, dtype, width_v=None, keys=None):
    """Fresh random q [B,H,S,D], k and v [B,Hk,T,D] as transposed views of [B,S,H,D] tensors."""
    made = []
    for n, length, d in (
        (heads, rows, width),
        (kv_heads, keys or rows, width),
        (kv_heads, keys or rows, width_v or width),
    ):
        made.append(torch.randn(batch, length, n, d, device=DEVICE).to(dtype).transpose(1, 2))
    return made


def visible(rows, keys, *, sink=0, window=0, start=0, dense=(0, 0)):
    """bool[S,T]: what row i (absolute position start + i) sees."""
    i = start + torch.arange(rows, device=DEVICE)[:, None]
    j = torch.arange(keys, device=DEVICE)[None, :]
    near = torch.ones_like(i + j, dtype=torch.bool) if window == 0 else (j < sink) | (i - j < window)
    return (j <= i) & (near | ((i >= dense[0]) & (i < dense[1])))


def expected(q, k, v, seen, scale, softcap=0.0, sink_logits=None):
    """Attention in fp32 (fp64 on the CPU) with the bool mask seen [B,S,T] -> [B,S,H,Dv]."""
    kind = torch.float32 if GPU else torch.float64
    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(kind), k.to(kind).repeat_interleave(group, 1), v.to(kind).repeat_interleave(group, 1)
    s = q @ k.transpose(2, 3) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~seen[:, None], float("-inf"))
    if sink_logits is not None:
        sinks = sink_logits.to(kind)[None, :, None, None].expand(*s.shape[:3], 1)
        p = torch.softmax(torch.cat([s, sinks], 3), 3)[..., :-1]
    else:
        p = torch.softmax(s, 3)
    return (p @ v).transpose(1, 2)


def close(actual, wanted, dtype):
    error = ((actual.to(wanted.dtype) - wanted).norm() / wanted.norm()).item()
    assert error < TOLERANCE[dtype], error
    return True


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs start as NaN: an element that no program writes shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, TILE - 1, TILE, TILE + 1, 3 * TILE + 5] if GPU else [1, TILE, 2 * TILE + 5])
def test_attention(rows, dtype, poisoned):
    from fluxc.kernels.attention import triton_impl

    q, k, v = inputs(2, 4, 2, rows, WIDTH, dtype)
    assert triton_impl.supported(q, k, v, scale=0.2, **OPTIONS) is None
    out = triton_impl.forward(q, k, v, scale=0.2, **OPTIONS)
    assert out.is_contiguous()
    assert close(out, expected(q, k, v, visible(rows, rows).expand(2, -1, -1), 0.2), dtype)


@here
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256] if GPU else [16, 80])
def test_head_dims(width, poisoned):
    from fluxc.kernels.attention import triton_impl

    q, k, v = inputs(1, 3, 1, TILE + 9, width, torch.float16)
    out = triton_impl.forward(q, k, v, scale=width**-0.5, **OPTIONS)
    assert close(out, expected(q, k, v, visible(TILE + 9, TILE + 9)[None], width**-0.5), torch.float16)


@here
@pytest.mark.parametrize("window", [1, 5, TILE, 2 * TILE + 3, 1000] if GPU else [5, 1000])
def test_own_window_soft_cap_and_sink_logits(window, poisoned):
    from fluxc.kernels.attention import triton_impl

    rows = 4 * TILE + 7
    q, k, v = inputs(1, 2, 2, rows, WIDTH, torch.float16)
    logits = torch.randn(2, device=DEVICE)
    options = {"scale": 0.5, "softcap": 3.0, "sink_logits": logits}
    out = triton_impl.forward(q, k, v, window=window, **options, **OPTIONS)
    assert close(out, expected(q, k, v, visible(rows, rows, window=window)[None], **options), torch.float16)


@here
@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:1], ids=str)
@pytest.mark.parametrize("sink", [0, 1, TILE // 2 + 1, TILE] if GPU else [0, TILE + 3])
@pytest.mark.parametrize("window", [1, TILE // 4 + 1, TILE, 2 * TILE + 20])
def test_streaming(sink, window, dtype, poisoned):
    from fluxc.kernels.streaming_attention import triton_impl

    rows = 5 * TILE + 3
    q, k, v = inputs(1, 2, 1, rows, WIDTH, dtype)
    out = triton_impl.forward(q, k, v, scale=0.3, sink=sink, window=window, **OPTIONS)
    assert close(out, expected(q, k, v, visible(rows, rows, sink=sink, window=window)[None], 0.3), dtype)


@here
@pytest.mark.parametrize("decode_full", [False, True])
@pytest.mark.parametrize("last", [0, 1, 20, 1000] if GPU else [0, 20])
def test_triangle(last, decode_full, poisoned):
    from fluxc.kernels.triangle_attention import triton_impl

    rows, lens = 5 * TILE + 3, [5 * TILE + 3, 3 * TILE - 2, 1] if GPU else [4 * TILE - 2, 1]
    q, k, v = inputs(len(lens), 1, 1, rows, WIDTH, torch.float16)
    prompt_lens = torch.tensor(lens, device=DEVICE)
    out = triton_impl.forward(
        q, k, v, prompt_lens, scale=0.3, sink=5, window=40, last=last, decode_full=decode_full, **OPTIONS
    )
    dense = [(max(0, n - last), 1 << 30 if decode_full else n) for n in lens]
    seen = torch.stack([visible(rows, rows, sink=5, window=40, dense=d) for d in dense])
    assert close(out, expected(q, k, v, seen, 0.3), torch.float16)


@here
@pytest.mark.parametrize("kind", ["streaming", "triangle"])
def test_routed_equals_each_samples_own_op_bit_for_bit(kind, poisoned):
    from fluxc.kernels.attention import triton_impl as full
    from fluxc.kernels.routed_attention import triton_impl as routed
    from fluxc.kernels.streaming_attention import triton_impl as streaming
    from fluxc.kernels.triangle_attention import triton_impl as triangle

    rows = 4 * TILE + 5 if GPU else 2 * TILE + 5
    q, k, v = inputs(4, 2, 1, rows, WIDTH, torch.float16)
    prompt_lens = torch.tensor([rows, rows, TILE, TILE], device=DEVICE)
    route = torch.tensor([True, False, True, False], device=DEVICE)
    sizes = {"scale": 0.3, "sink": TILE + 4, "window": TILE, **OPTIONS}
    if GPU:
        torch.cuda.set_sync_debug_mode("error")
    out = routed.forward(q, k, v, route, prompt_lens, kind=kind, last=16, **sizes)
    if GPU:
        torch.cuda.set_sync_debug_mode("default")
    dense = full.forward(q, k, v, scale=0.3, **OPTIONS)
    sparse = streaming.forward(q, k, v, **sizes)
    if kind == "triangle":
        sparse = triangle.forward(q, k, v, prompt_lens, last=16, **sizes)
    for b, is_full in enumerate(route.tolist()):
        assert torch.equal(out[b], (dense if is_full else sparse)[b])


@here
def test_log_sum_exp(poisoned):
    from fluxc.kernels.triton_launch import Call, attend, attend_with_lse

    rows = 2 * TILE + 3
    q, k, v = inputs(2, 4, 2, rows, WIDTH, torch.float16)
    call = Call(0.3, sink=3, window=TILE)
    out, lse = attend_with_lse(q, k, v, call)
    s = (q.double() @ k.double().repeat_interleave(2, 1).transpose(2, 3)) * 0.3
    wanted = s.masked_fill(~visible(rows, rows, sink=3, window=TILE), float("-inf")).logsumexp(3)
    assert torch.equal(out, attend(q, k, v, call))
    assert close(lse, wanted, torch.float16)


@here
def test_queries_that_start_late(poisoned):
    from fluxc.kernels.streaming_attention import triton_impl

    rows, keys = TILE + 3, 5 * TILE
    q, k, v = inputs(3, 2, 2, rows, WIDTH, torch.float16, keys=keys)
    starts = [0, TILE - 1, keys - rows]
    out = triton_impl.forward(
        q, k, v, scale=0.3, sink=3, window=70, q_start=torch.tensor(starts, device=DEVICE), **OPTIONS
    )
    seen = torch.stack([visible(rows, keys, sink=3, window=70, start=start) for start in starts])
    assert close(out, expected(q, k, v, seen, 0.3), torch.float16)


@here
def test_strides_and_value_width(poisoned):
    from fluxc.kernels.attention import triton_impl

    rows = TILE + 1
    q, k, v = inputs(2, 4, 2, rows, 32, torch.float16, width_v=16)
    packed = torch.randn(2, rows, 8, 33, device=DEVICE).half()
    q = packed[:, :, 1:5, 1:].transpose(1, 2)  # rows 33 elements apart: no descriptor can read it
    k = k[:, :1].expand(2, 2, rows, 32)
    out = triton_impl.forward(q, k, v, scale=0.3, **OPTIONS)
    assert close(out, expected(q, k, v, visible(rows, rows).expand(2, -1, -1), 0.3), torch.float16)


@here
def test_padding_never_reaches_a_valid_row(poisoned):
    from fluxc.kernels.streaming_attention import triton_impl

    q, k, v = inputs(1, 2, 1, 3 * TILE, WIDTH, torch.float16)
    n = TILE + 7
    whole = triton_impl.forward(q, k, v, scale=0.3, sink=3, window=20, **OPTIONS)
    k[:, :, n:], v[:, :, n:] = 1e4, -1e4
    padded = triton_impl.forward(q, k, v, scale=0.3, sink=3, window=20, **OPTIONS)
    assert torch.equal(whole[:, :n], padded[:, :n])
    assert padded.isfinite().all()


@here
def test_refusals_name_the_reason():
    from fluxc.kernels.attention import triton_impl

    q, k, v = inputs(1, 4, 2, 8, 16, torch.float16)

    def reason(q=q, k=k, v=v, scale=0.3):
        return triton_impl.supported(q, k, v, scale=scale, **OPTIONS)

    assert reason() is None
    assert "float64" in reason(q.double(), k.double(), v.double())
    assert "dtype" in reason(k=k.float())
    assert "512" in reason(*inputs(1, 4, 2, 8, 512, torch.float16))
    assert "multiple" in reason(q=q[:, :3])
    assert "contiguous" in reason(k=k.transpose(2, 3).contiguous().transpose(2, 3))
    assert "scale" in reason(scale=-1.0)
    assert "empty" in reason(q=q[:, :, :0])


@pytest.mark.skipif(GPU or INTERPRET, reason="the kernels run here")
def test_a_cpu_tensor_without_the_interpreter_is_refused():
    pytest.importorskip("triton")
    from fluxc.kernels.attention import triton_impl

    assert "CUDA" in triton_impl.supported(*inputs(1, 1, 1, 4, 16, torch.float16), scale=1.0, **OPTIONS)
