"""`fluxc::kv_write` against its reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.kv_write.reference import kv_write as reference
from fluxc.kernels.schemas import PAGE
from fluxc.testing import layouts, random_qkv

kernels.register()
kv_write = torch.ops.fluxc.kv_write
PAGES = 3


def fresh(dtype=torch.float32):
    return torch.full((PAGES, 2, 2, PAGE, 4), torch.nan, dtype=dtype)


def tokens(B=2, S=5, dtype=torch.float32):
    return random_qkv(B, 2, 2, S, 4, dtype=dtype)[1:]


def some_slots(B, S, seed=0):
    order = torch.randperm(PAGES * PAGE, generator=torch.Generator().manual_seed(seed))
    slots = order[: B * S].view(B, S).clone()
    slots[slots % 5 == 0] = -1
    return slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 60), (1, PAGES * PAGE)])
def test_equals_the_reference(shape, dtype):
    k, v = tokens(*shape, dtype)
    slots, actual, expected = some_slots(*shape), fresh(dtype), fresh(dtype)
    assert kv_write(actual, k, v, slots) is None
    reference(expected, k, v, slots)
    assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))


def test_slots_are_page_then_offset():
    cache, (k, v) = fresh(), tokens(B=1, S=2)
    kv_write(cache, k, v, torch.tensor([[0, 2 * PAGE + 9]]))
    assert torch.equal(cache[2, 0, :, 9], k[0, :, 1])
    assert torch.equal(cache[0, 1, :, 0], v[0, :, 0])
    assert cache.isfinite().sum() == 2 * k.numel()


def test_dropped_tokens_write_nothing():
    cache = fresh()
    kv_write(cache, *tokens(), torch.full((2, 5), -1))
    assert cache.isnan().all()


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    k, v = tokens()
    actual, expected = fresh(), fresh()
    kv_write(actual, layouts(k)[layout], layouts(v)[layout], some_slots(2, 5))
    reference(expected, k, v, some_slots(2, 5))
    assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))


def test_a_view_of_a_larger_cache_is_written_in_place():
    whole = torch.zeros(PAGES + 2, 2, 2, PAGE, 4)
    kv_write(whole[1:-1], *tokens(), some_slots(2, 5))
    assert whole[1:-1].any()
    assert not whole[0].any()
    assert not whole[-1].any()


def test_opcheck():
    torch.library.opcheck(kv_write.default, (fresh().zero_(), *tokens(), some_slots(2, 5)))


class Writes(torch.nn.Module):
    def forward(self, cache, k, v, slots):
        kv_write(cache, k, v, slots)
        return cache.sum()


def test_exports_as_a_mutation_of_the_cache():
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    shapes = ({}, {0: batch, 2: rows}, {0: batch, 2: rows}, {0: batch, 1: rows})
    sample = (fresh().zero_(), *tokens(), some_slots(2, 5))
    program = torch.export.export(Writes(), sample, dynamic_shapes=shapes)
    for shape in ((1, 1), (3, 7)):
        k, v = tokens(*shape)
        actual, expected = fresh().zero_(), fresh().zero_()
        program.module()(actual, k, v, some_slots(*shape))
        reference(expected, k, v, some_slots(*shape))
        assert torch.equal(actual, expected)


BAD = {
    "pages of another size": ({"cache": torch.zeros(3, 2, 2, 32, 4)}, "cache must be"),
    "heads of another cache": ({"cache": torch.zeros(3, 2, 1, PAGE, 4)}, "k must be"),
    "another dtype": ({"cache": fresh(torch.float16)}, "k is torch.float32, the cache is torch.float16"),
    "slot past the cache": ({"slots": torch.full((2, 5), PAGES * PAGE)}, "slots must lie in -1..191"),
    "slot below -1": ({"slots": torch.full((2, 5), -2)}, "slots must lie in -1..191"),
    "slots of other tokens": ({"slots": torch.zeros(2, 4, dtype=torch.int64)}, "k must be"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    k, v = tokens()
    given = {"cache": fresh(), "slots": some_slots(2, 5)} | changes
    with pytest.raises(UserError, match=f"fluxc::kv_write: {message}"):
        kv_write(given["cache"], k, v, given["slots"])
