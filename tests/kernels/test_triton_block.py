"""Block scores and block attention by Triton. See test_triton_attention.py for how they run without a GPU."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fluxc import kernels
from fluxc.kernels.block_attention.reference import block_attention as attention_reference
from fluxc.kernels.block_scores.op import chunks, keep
from fluxc.kernels.block_scores.reference import block_scores as scores_reference
from fluxc.kernels.block_scores.reference import block_sums
from fluxc.testing import assert_close, random_qkv

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
here = pytest.mark.skipif(not (INTERPRET or GPU), reason="needs the Triton interpreter or a GPU")
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if GPU else [torch.float16, torch.float32]
BLOCK, STRIDE, WIDTH = (128, 16, 64) if GPU else (32, 8, 16)
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17] if GPU else [1, BLOCK, 3 * BLOCK + 9]


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


@pytest.fixture(autouse=True)
def defined():
    kernels.register()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def operands(rows, dtype, heads=(2, 1), width=WIDTH):
    return [x.to(DEVICE) for x in random_qkv(2, *heads, rows, width, dtype=dtype)]


def wide(tensors):
    return [x.float() if x.is_floating_point() else x for x in tensors]


def kept(index, count):
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    mask = torch.zeros(*count.shape, index.shape[-1] + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, torch.where(used, index.long(), index.shape[-1]), True)[..., :-1]


def lists(heads, rows, share=0.4):
    blocks = -(-rows // BLOCK)
    picked = ((torch.rand(2, heads, blocks, blocks) < share) | torch.eye(blocks, dtype=torch.bool)).tril()
    count = picked.sum(-1).int()
    index = picked.int().argsort(dim=-1, descending=True, stable=True).int()
    index = index.masked_fill(torch.arange(blocks) >= count[..., None], 1 << 20)
    return index.to(DEVICE), count.to(DEVICE)


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scorer", ["antidiagonal", "pooled"])
@pytest.mark.parametrize("rows", LENGTHS)
def test_scores(rows, scorer, dtype):
    q, k, _ = operands(rows, dtype)
    options = {"scale": 0.5, "layer": 0, "block": BLOCK, "stride": STRIDE, "threshold": 0.7, "scorer": scorer}
    index, count = torch.ops.fluxc.block_scores(q, k, **options)
    found, wanted = kept(index, count), kept(*scores_reference(q.float(), k.float(), **options))
    sums = block_sums(q.float(), k.float(), 0.5, BLOCK, STRIDE, scorer)
    edge = sums.masked_fill(~wanted, torch.inf).amin(-1, keepdim=True)
    near = 1e-4 if dtype == torch.float32 else 2e-2
    assert (sums - edge)[found != wanted].abs().le(near * sums.sum(-1).max()).all()
    own = torch.arange(count.shape[-1], device=DEVICE)
    assert found[..., own, own].all()
    assert found[..., 0].all()


def score_tiles(name):
    from fluxc.kernels import triton_config as config

    pinned = config.SCORES_90 if GPU else config.ScoreTiles(8, 16, 8, 4, 1, tma=True)
    return pinned if name == "tma" else dataclasses.replace(pinned, tma=False)


def sums_of(q, k, scorer):
    """Block sums from a score matrix in memory, by matrix products, which a GPU's memory holds at 16K tokens too."""
    b_q, b_k = (chunks(x.double(), STRIDE, scorer, keys=keys) for x, keys in ((q, False), (k, True)))
    s = b_q @ b_k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3) * 0.5
    s = s / (1 if scorer == "pooled" else STRIDE)
    weights = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    per = BLOCK // STRIDE
    tail = -s.shape[-1] % per
    return F.pad(weights, (0, tail, 0, tail)).unflatten(3, (-1, per)).unflatten(2, (-1, per)).sum((3, 5))


@here
@pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (9, 0), reason="needs TMA")
@pytest.mark.parametrize("name", ["tma", "pointers"])
@pytest.mark.parametrize(
    ("blocks", "tail", "room", "scorer"),
    [
        (0, STRIDE - 1, 0, "antidiagonal"),
        (5 if GPU else 4, 0, 1 << 30, "antidiagonal"),
        (131 if GPU else 18, 5, 1 << 30, "antidiagonal"),
        (70 if GPU else 5, STRIDE - 1, 0, "antidiagonal"),
        (40 if GPU else 4, 5, 1 << 30, "pooled"),
    ],
)
def test_scores_in_tiles_and_launches(blocks, tail, room, scorer, name):
    """TMA and plain loads; all rows in one launch, or a tile of rows in each; the last chunk whole or cut off."""
    from fluxc.kernels import triton_scores

    kind = torch.bfloat16 if GPU else torch.float16
    q, k, _ = (x.to(DEVICE) for x in random_qkv(1, 2, 1, blocks * BLOCK + tail, WIDTH, dtype=kind))
    how = {"scale": 0.5, "block": BLOCK, "stride": STRIDE, "threshold": 0.7, "scorer": scorer}
    found = kept(*triton_scores.block_scores(q, k, **how, tiles=score_tiles(name), room=room))
    sums = sums_of(q, k, scorer)
    wanted = kept(*keep(sums, torch.arange(sums.shape[2], device=DEVICE), 0.7))
    edge = sums.masked_fill(~wanted, torch.inf).amin(-1, keepdim=True)
    assert (sums - edge)[found != wanted].abs().le(1e-2 * sums.sum(-1).max()).all()
    assert (found == wanted).float().mean() > 0.99


@here
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", LENGTHS)
def test_attention(rows, dtype):
    args = (*operands(rows, dtype), *lists(2, rows))
    how = {"scale": 0.3, "layer": 0, "block": BLOCK}
    assert_close(torch.ops.fluxc.block_attention(*args, **how), attention_reference(*wide(args), **how))


@here
@pytest.mark.parametrize("block", [16, 64, 256] if GPU else [16])
@pytest.mark.parametrize("width", [64, 80, 128, 256] if GPU else [20])
def test_attention_sizes(width, block, monkeypatch):
    monkeypatch.setitem(globals(), "BLOCK", block)
    rows = 2 * block + 5
    args = (*operands(rows, torch.float16, (4, 2), width), *lists(4, rows))
    how = {"scale": 0.3, "layer": 0, "block": block, "softcap": 3.0}
    how["sink_logits"] = torch.linspace(-1, 1, 4, device=DEVICE)
    assert_close(torch.ops.fluxc.block_attention(*args, **how), attention_reference(*wide(args), **how))


@here
def test_rows_without_a_key_are_zero():
    rows = BLOCK + 3
    q, k, v = operands(rows, torch.float16)
    index, count = torch.zeros(2, 2, 2, 1).int().to(DEVICE), torch.tensor([0, 1]).int().expand(2, 2, 2).to(DEVICE)
    how = {"scale": 0.3, "layer": 0, "block": BLOCK}
    out = torch.ops.fluxc.block_attention(q, k, v, index, count, **how)
    assert out[:, :BLOCK].eq(0).all()
    assert_close(out, attention_reference(q.float(), k.float(), v.float(), index, count, **how))


@here
@pytest.mark.parametrize("bad", ["a later block", "a count past the list", "a negative block"])
def test_a_list_that_breaks_the_rules_is_not_a_number(bad):
    from fluxc.kernels import triton_block

    rows = 2 * BLOCK + 3
    q, k, v = operands(rows, torch.float16)
    index, count = lists(2, rows, share=2.0)
    if bad == "a count past the list":
        count[0, 0, 2] = 4
    else:
        index[0, 0, 2, 0] = 9 if bad == "a later block" else -3
    out = triton_block.block_attention(q, k, v, index, count, scale=0.3, block=BLOCK)
    assert out[0, 2 * BLOCK :, 0].isnan().all()
    assert out[0, : 2 * BLOCK].isfinite().all()
    assert out[:, :, 1].isfinite().all()
