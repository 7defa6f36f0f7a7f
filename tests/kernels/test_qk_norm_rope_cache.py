"""`fluxc::qk_norm_rope_cache` against its reference, and against transformers' own parts."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.qk_norm_rope_cache.reference import qk_norm_rope_cache as reference
from fluxc.kernels.schemas import PAGE
from fluxc.testing import assert_close, layouts, random_qkv

kernels.register()
fused = torch.ops.fluxc.qk_norm_rope_cache
HOW = {"eps": 1e-6, "pool": 9}
B, H, HK, D = 2, 4, 2, 16


def operands(rows=40, dtype=torch.float32, norm=True, turning=D):
    q, k, v = random_qkv(B, H, HK, rows, D, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(D, generator=generator).to(dtype) if norm else None for _ in range(2)]
    angles = torch.rand(B, rows, turning // 2, generator=generator).repeat(1, 1, 2) * 6
    cache = torch.zeros(3, 2, HK, PAGE, D, dtype=dtype)
    slots = torch.randperm(3 * PAGE, generator=generator)[: B * rows].view(B, rows).clone()
    slots[0, ::5] = -1
    lens = torch.tensor([rows, max(1, rows // 2)])
    return [q, k, v, *weights, angles.cos().to(dtype), angles.sin().to(dtype), cache, slots, lens]


def wide(args):
    return [x.float() if x is not None and x.is_floating_point() else x for x in args]


def check(args, **how):
    mine, theirs = list(args), wide(args)
    mine[7], theirs[7] = mine[7].clone(), theirs[7].clone()
    found, wanted = fused(*mine, **how), reference(*theirs, **how)
    for actual, expected in zip((*found, mine[7]), (*wanted, theirs[7]), strict=True):
        # The pool sums in fp32 what the norm rounded to the dtype.
        assert_close(actual.to(args[0].dtype), expected)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("turning", [D, D // 2])
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_equals_the_reference(rows, turning, norm, dtype):
    q, k, pooled = check(operands(rows, dtype, norm, turning), **HOW)
    assert q.transpose(1, 2).is_contiguous()
    assert k.transpose(1, 2).is_contiguous()
    assert pooled.dtype == torch.float32


def test_is_what_transformers_does():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    args = operands()
    q, k, _, q_weight, k_weight, cos, sin, *_ = args
    norms = []
    for weight in (q_weight, k_weight):
        norms.append(Qwen3RMSNorm(D, eps=1e-6))
        norms[-1].weight.data = weight
    wanted = apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin)
    for mine, theirs in zip(fused(*args, **HOW)[:2], wanted, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, k, v, *rest = operands()
    check([*(layouts(x)[layout] for x in (q, k, v)), *rest], **HOW)


@pytest.mark.parametrize("pool", [0, 9])
def test_opcheck(pool):
    torch.library.opcheck(fused.default, tuple(operands()), HOW | {"pool": pool})


def test_nothing_is_pooled_where_no_row_is_asked_for():
    args = operands()
    args[-1] = torch.zeros(B, dtype=torch.int64)  # prompts of no length, which are not read
    *found, pooled = check(args, **HOW | {"pool": 0})
    assert pooled.shape == (0, D)
    for mine, theirs in zip(found, fused(*operands(), **HOW), strict=False):
        assert torch.equal(mine, theirs)


BAD = {
    "odd RoPE": ({"cos": torch.zeros(2, 40, 7)}, "cos has 7 columns"),
    "other angles": ({"sin": torch.zeros(2, 40, 8)}, "sin is"),
    "weight of another width": ({"q_weight": torch.zeros(8)}, "q_weight is"),
    "slots past the cache": ({"slots": torch.full((2, 40), 3 * PAGE)}, "slots must lie"),
    "an empty prompt": ({"prompt_lens": torch.tensor([40, 0])}, "prompt_lens must lie in 1..40"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    names = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin", "cache", "slots", "prompt_lens")
    with pytest.raises(UserError, match=f"fluxc::qk_norm_rope_cache: {message}"):
        fused(**dict(zip(names, operands(), strict=True)) | changes, **HOW)
