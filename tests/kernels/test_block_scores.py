"""`fluxc::block_scores` against its reference, which sorts."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.block_scores import op
from fluxc.kernels.block_scores.reference import block_scores as reference
from fluxc.kernels.block_scores.reference import block_sums
from fluxc.testing import LargestAllocation, random_qkv

kernels.register()
block_scores = torch.ops.fluxc.block_scores
HOW = {"scale": 0.5, "layer": 0, "block": 16, "stride": 4, "threshold": 0.8}
LENGTHS = [1, 3, 4, 15, 16, 17, 100, 160, 1030]


def operands(rows, dtype=torch.float32, heads=(4, 2)):
    return random_qkv(2, *heads, rows, 8, dtype=dtype)[:2]


def kept(index, count):
    """The lists as a mask [B,H,Sb,Sb]."""
    used = torch.arange(index.shape[-1]) < count[..., None]
    wide = torch.zeros(*count.shape, index.shape[-1] + 1, dtype=torch.bool)
    return wide.scatter(-1, torch.where(used, index.long(), index.shape[-1]), True)[..., :-1]


@pytest.mark.parametrize("scorer", op.SCORERS)
@pytest.mark.parametrize("rows", LENGTHS)
def test_equals_the_reference(rows, scorer):
    for threshold in (0.1, 0.8, 0.99):
        options = HOW | {"scorer": scorer, "threshold": threshold}
        found, wanted = block_scores(*operands(rows), **options), reference(*operands(rows), **options)
        assert torch.equal(kept(*found), kept(*wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_differs_only_next_to_the_cut(dtype):
    q, k = operands(300, dtype)
    found, wanted = kept(*block_scores(q, k, **HOW)), kept(*reference(q.float(), k.float(), **HOW))
    sums = block_sums(q.float(), k.float(), 0.5, 16, 4, "antidiagonal")
    smallest = sums.masked_fill(~wanted, torch.inf).amin(-1, keepdim=True)
    assert (sums - smallest)[found != wanted].abs().le(1e-2).all()


def test_reaches_the_threshold_with_as_few_blocks_as_possible():
    q, k = operands(400)
    mask, sums = kept(*block_scores(q, k, **HOW)), block_sums(q, k, 0.5, 16, 4, "antidiagonal")
    total = sums.sum(-1)
    assert (sums.masked_fill(~mask, 0).sum(-1) >= 0.8 * total * (1 - 1e-5)).all()
    always = torch.zeros_like(mask) | torch.eye(mask.shape[-1], dtype=torch.bool)
    always[..., 0] = True
    free = sums.masked_fill(~mask | always, torch.inf)
    without_one = sums.masked_fill(~mask, 0).sum(-1) - free.amin(-1)
    others = free.isfinite().any(-1)
    forced = sums.masked_fill(~(mask & always), 0)
    assert (without_one - forced.sum(-1))[others].lt((0.8 * total)[others]).all()


def test_lists_are_ascending_and_hold_the_first_block_and_the_own():
    index, count = block_scores(*operands(400), **HOW)
    own = torch.arange(count.shape[-1])
    last = index.gather(-1, count.long()[..., None] - 1)[..., 0]
    assert torch.equal(last, own.int().expand_as(last))
    assert (index[..., 0] == 0).all()
    used = torch.arange(index.shape[-1]) < count[..., None]
    assert (index[..., 1:] > index[..., :-1])[used[..., 1:]].all()


def test_a_needle_is_kept():
    q, k = (x[:, :1] * 0.1 for x in operands(640))
    k[:, :, 200:204] = q[:, :, 600:604].flip(2) * 3000
    index, count = block_scores(q, k, **HOW | {"threshold": 0.5})
    assert kept(index, count)[:, :, 600 // 16, 200 // 16].all()


def test_no_matrix_of_scores_in_memory():
    q, k = operands(8192, heads=(2, 1))
    with LargestAllocation() as seen:
        op.run(q, k, **HOW | {"block": 128, "stride": 8})
    whole = 4 * 4 * (8192 // 8) ** 2  # fp32, batch 2, 2 heads
    assert seen.bytes < whole / 2


def test_opcheck():
    torch.library.opcheck(block_scores.default, operands(50), HOW)


class Scores(torch.nn.Module):
    def forward(self, q, k):
        return block_scores(q, k, **HOW)


def test_exports_with_any_batch_and_length():
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    program = torch.export.export(Scores(), operands(50), dynamic_shapes=({0: batch, 2: rows},) * 2)
    for length in (1, 70):
        for mine, theirs in zip(program.module()(*operands(length)), Scores()(*operands(length)), strict=True):
            assert torch.equal(mine, theirs)


BAD = {
    "block of 48": ({"block": 48}, "block is 48, must be a power of two"),
    "block too small": ({"block": 8}, "block is 8"),
    "stride": ({"stride": 3}, "stride is 3, must divide block, 16"),
    "threshold": ({"threshold": 1.5}, "threshold is 1.5"),
    "scorer": ({"scorer": "random"}, "scorer is 'random', must be one of antidiagonal, pooled"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_options_name_op_and_argument(changes, message):
    with pytest.raises(UserError, match=f"fluxc::block_scores: {message}"):
        block_scores(*operands(50), **HOW | changes)


@pytest.mark.parametrize("k", [torch.zeros(2, 3, 50, 8), torch.zeros(2, 2, 49, 8), torch.zeros(2, 2, 50, 8).half()])
def test_bad_keys_are_named(k):
    with pytest.raises(UserError, match="fluxc::block_scores: k is"):
        block_scores(operands(50)[0], k, **HOW)
