"""`fluxc::block_attention` against its reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.attention.reference import attention as full_reference
from fluxc.kernels.block_attention import op
from fluxc.kernels.block_attention.reference import block_attention as reference
from fluxc.testing import PoisonedMemory, assert_close, layouts, random_qkv

kernels.register()
block_attention = torch.ops.fluxc.block_attention
BLOCK = 16
HOW = {"scale": 0.3, "layer": 0, "block": BLOCK}
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 100, 160]


def lists(B, H, rows, share=0.4, own=True, seed=0):
    """Random ascending lists; entries past the count are nonsense."""
    blocks = -(-rows // BLOCK)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.rand(B, H, blocks, blocks, generator=generator) < share
    eye = torch.eye(blocks, dtype=torch.bool)
    picked = ((picked | eye) if own else (picked & ~eye)).tril()
    count = picked.sum(-1).int()
    index = picked.int().argsort(dim=-1, descending=True, stable=True).int()
    return index.masked_fill(torch.arange(blocks) >= count[..., None], 1 << 20), count


def operands(rows, heads=(4, 2), width=16, dtype=torch.float32, **options):
    return (*random_qkv(2, *heads, rows, width, dtype=dtype), *lists(2, heads[0], rows, **options))


def wide(args):
    return [x.float() if x.is_floating_point() else x for x in args]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", LENGTHS)
def test_equals_the_reference(rows, dtype):
    args = operands(rows, dtype=dtype)
    out = block_attention(*args, **HOW)
    assert out.is_contiguous()
    assert_close(out, reference(*wide(args), **HOW))


@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (2, 1)])
def test_heads(heads):
    args = operands(70, heads)
    assert_close(block_attention(*args, **HOW), reference(*args, **HOW))


def test_all_blocks_are_full_attention():
    args = operands(100, share=2.0)
    assert_close(block_attention(*args, **HOW), full_reference(*args[:3], scale=0.3, layer=0))


@pytest.mark.parametrize("features", [{"softcap": 2.0}, {"sink_logits": torch.linspace(-1, 1, 4)}])
def test_soft_cap_and_sink_logits(features):
    args = operands(100)
    assert_close(block_attention(*args, **HOW, **features), reference(*args, **HOW, **features))


def test_rows_without_a_key_are_zero():
    args = operands(100, own=False)
    with PoisonedMemory():
        out = op.run(*args, **HOW)
    assert out[:, :BLOCK].eq(0).all()
    assert_close(out, reference(*args, **HOW))


def test_values_of_another_width():
    q, k, _, *rest = operands(50)
    v = random_qkv(2, 4, 2, 50, 16, 8)[2]
    assert_close(block_attention(q, k, v, *rest, **HOW), reference(q, k, v, *rest, **HOW))


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, k, v, *rest = operands(50)
    given = [layouts(x)[layout] for x in (q, k, v)]
    assert_close(block_attention(*given, *rest, **HOW), reference(q, k, v, *rest, **HOW))


def test_opcheck():
    torch.library.opcheck(block_attention.default, operands(50), HOW)


BAD = {
    "block of 48": ({"block": 48}, "block is 48, must be a power of two"),
    "another number of blocks": ({"block": 32}, r"block_index and block_count must be \(2, 4, 2, 'M'\)"),
    "lists of int64": ({"block_count": lists(2, 4, 50)[1].long()}, "block_count must be int32"),
    "count past the list": (
        {"block_count": torch.full((2, 4, 4), 5).int()},
        "block_count must lie in 0..4, found 5..5",
    ),
    "a later block": ({"block_index": torch.full((2, 4, 4, 4), 3).int()}, "block_index must not name"),
    "descending": ({"block_index": torch.zeros(2, 4, 4, 4).int()}, "block_index must be ascending"),
    "fewer keys": ({"k": torch.zeros(2, 2, 49, 16), "v": torch.zeros(2, 2, 49, 16)}, "k has 49 keys"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    names = ("q", "k", "v", "block_index", "block_count")
    given = dict(zip(names, operands(50, share=2.0), strict=True)) | HOW | changes
    with pytest.raises(UserError, match=f"fluxc::block_attention: {message}"):
        block_attention(**given)
