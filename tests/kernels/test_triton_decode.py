"""The Triton decode kernel against plain fp64. See test_triton_attention.py for how it runs without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if GPU else [torch.float16, torch.float32]
PAGE = 64


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


def paged(lens, kv_heads, width, dtype, pages=7):
    """A cache whose pages are shuffled over requests and whose unused slots are NaN, its table, and k, v [n,Hk,D]."""
    cache = torch.full((len(lens) * pages, 2, kv_heads, PAGE, width), float("nan"), device=DEVICE, dtype=dtype)
    table = torch.randperm(len(lens) * pages).int().view(len(lens), pages).to(DEVICE)
    tokens = []
    for b, n in enumerate(lens):
        kv = torch.randn(2, n, kv_heads, width, device=DEVICE).to(dtype)
        for slot in range(n):
            cache[table[b, slot // PAGE], :, :, slot % PAGE] = kv[:, slot]
        tokens.append(kv)
    return cache, table, tokens


def expected(q, tokens, scale, softcap=0.0, sink_logits=None):
    """Attention of each request's one query, fp64 [B,H,D]."""
    rows = []
    for b, kv in enumerate(tokens):
        k, v = kv.double().repeat_interleave(q.shape[1] // kv.shape[2], 2).permute(0, 2, 1, 3)
        s = torch.einsum("hd,hnd->hn", q[b].double(), k) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        if sink_logits is not None:
            s = torch.cat([s, sink_logits.double()[:, None]], 1)
        p = torch.softmax(s, 1)[:, : kv.shape[1]]
        rows.append(torch.einsum("hn,hnd->hd", p, v))
    return torch.stack(rows)


def close(actual, wanted, dtype):
    error = ((actual.double() - wanted).norm() / wanted.norm()).item()
    assert error < TOLERANCE[dtype], error
    return True


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 1, 64), (3, 3, 16), (7, 1, 80), (2, 1, 128)])
def test_decode(heads, kv_heads, width, dtype):
    from fluxc.kernels import triton_decode

    cache, table, tokens = paged([1, PAGE, 3 * PAGE + 5, 7 * PAGE], kv_heads, width, dtype)
    q = torch.randn(4, 1, heads, width, device=DEVICE).to(dtype).transpose(1, 2)[:, :, 0]
    lens = torch.tensor([t.shape[1] for t in tokens], device=DEVICE, dtype=torch.int32)
    assert triton_decode.unsupported(q, cache, table, lens) is None
    for _ in range(2):
        out = triton_decode.decode_attention(q, cache, table, lens, scale=0.3)
        assert close(out, expected(q, tokens, 0.3), dtype)


@here
def test_soft_cap_sink_logits_and_empty_requests():
    from fluxc.kernels import triton_decode

    cache, table, tokens = paged([70, 5], 2, 64, torch.float16)
    q = torch.randn(2, 4, 64, device=DEVICE).half()
    lens = torch.tensor([70, 5], device=DEVICE, dtype=torch.int32)
    options = {"scale": 0.3, "softcap": 2.0, "sink_logits": torch.randn(4, device=DEVICE)}
    out = triton_decode.decode_attention(q, cache, table, lens, **options)
    assert close(out, expected(q, tokens, **options), torch.float16)
    lens[1] = 0
    out = triton_decode.decode_attention(q, cache, table, lens, scale=0.3)
    assert out[1].eq(0).all()
    assert close(out[:1], expected(q[:1], tokens[:1], 0.3), torch.float16)


@here
@pytest.mark.skipif(not GPU, reason="graphs need a GPU")
def test_one_graph_serves_other_lengths_and_pages():
    from fluxc.kernels import triton_decode

    cache, table, tokens = paged([200, 300], 2, 64, torch.bfloat16)
    q = torch.randn(2, 8, 64, device=DEVICE).bfloat16()
    lens = torch.tensor([1, 1], device=DEVICE, dtype=torch.int32)
    triton_decode.decode_attention(q, cache, table, lens, scale=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_decode.decode_attention(q, cache, table, lens, scale=0.3)
    for order in ([0, 1], [1, 0]):
        lens.copy_(torch.tensor([tokens[b].shape[1] for b in order]))
        shown = table.clone()
        table.copy_(shown[order])
        graph.replay()
        assert close(out, expected(q, [tokens[b] for b in order], 0.3), torch.bfloat16)
        table.copy_(shown)


@here
def test_refusals_name_the_reason():
    from fluxc.kernels import triton_decode

    cache, table, _ = paged([3], 2, 16, torch.float16, pages=1)
    q, lens = torch.randn(1, 4, 16, device=DEVICE).half(), torch.tensor([3], device=DEVICE, dtype=torch.int32)
    assert "dtypes" in triton_decode.unsupported(q.float(), cache, table, lens)
    assert "cache" in triton_decode.unsupported(q, cache[:, :, :, :32], table, lens)
    assert "fit" in triton_decode.unsupported(q[:, :3], cache, table, lens)
    assert "i32" in triton_decode.unsupported(q, cache, table.long(), lens)
