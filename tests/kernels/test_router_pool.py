"""`fluxc::router_pool` against its reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.router_pool.reference import router_pool as reference
from fluxc.testing import assert_close, gradients, layouts, random_qkv

kernels.register()
router_pool = torch.ops.fluxc.router_pool


def queries(B=2, H=3, S=40, D=8, **options):
    return random_qkv(B, H, H, S, D, **options)[0]


@pytest.mark.parametrize("pool", [1, 2, 19, 20, 21, 40, 100])
@pytest.mark.parametrize("lengths", [(40, 39), (1, 2), (20, 21)])
def test_equals_the_reference(pool, lengths):
    q, lengths = queries(), torch.tensor(lengths)
    out = router_pool(q, lengths, pool=pool)
    assert out.dtype == torch.float32
    assert out.shape == (2, 8)
    assert_close(out, reference(q, lengths, pool=pool))


def test_is_the_mean_of_the_prefix_mean_and_the_suffix_mean():
    q = queries(B=1)
    prefix, suffix = q[:, :, :10].mean((1, 2)), q[:, :, 25:35].mean((1, 2))
    assert_close(router_pool(q, torch.tensor([35]), pool=10), (prefix + suffix) / 2)


def test_rows_after_the_prompt_have_no_say():
    q = queries()
    out = router_pool(q, torch.tensor([30, 7]), pool=10)
    q[0, :, 30:], q[1, :, 7:] = torch.nan, torch.nan
    assert torch.equal(router_pool(q, torch.tensor([30, 7]), pool=10), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_in_fp32(dtype):
    q = queries(S=300, dtype=dtype)
    out = router_pool(q, torch.tensor([300, 250]), pool=100)
    assert out.dtype == torch.float32
    assert_close(out, reference(q.float(), torch.tensor([300, 250]), pool=100))


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, lengths = layouts(queries())[layout], torch.tensor([30, 7])
    assert_close(router_pool(q, lengths, pool=10), reference(q, lengths, pool=10))


@pytest.mark.parametrize("lengths", [(9, 4), (1, 2)])
def test_gradcheck(lengths):
    q = queries(S=9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: router_pool(q, torch.tensor(lengths), pool=3), (q,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_has_the_queries_dtype(dtype):
    q = queries(dtype=dtype)
    (actual,) = gradients(lambda q: router_pool(q, torch.tensor([30, 7]), pool=10), q)
    (expected,) = gradients(lambda q: reference(q, torch.tensor([30, 7]), pool=10), q.float())
    assert actual.dtype == dtype
    assert_close(actual, expected)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    torch.library.opcheck(router_pool.default, (queries(requires_grad=grad), torch.tensor([30, 7])), {"pool": 10})


class Pools(torch.nn.Module):
    def forward(self, q, prompt_lens):
        return router_pool(q, prompt_lens, pool=10) * 2


def test_exports_with_any_batch_and_length():
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    sample = (queries(), torch.tensor([30, 7]))
    program = torch.export.export(Pools(), sample, dynamic_shapes=({0: batch, 2: rows}, {0: batch}))
    assert [r.lower for r in program.range_constraints.values()] == [1, 1]
    for inputs in ((queries(B=1, S=1), torch.tensor([1])), (queries(B=3, S=50), torch.tensor([50, 1, 10]))):
        assert torch.equal(program.module()(*inputs), Pools()(*inputs))


BAD = {
    "no rows to pool": ({"pool": 0}, "pool is 0"),
    "an empty prompt": ({"lengths": (0, 3)}, "prompt_lens must lie in 1..40, found 0..3"),
    "a prompt longer than the rows": ({"lengths": (1, 41)}, "prompt_lens must lie in 1..40, found 1..41"),
    "prompts of another batch": ({"lengths": (1,)}, r"prompt_lens must be \[2\], is \(1,\)"),
    "no rows": ({"q": torch.zeros(2, 3, 0, 8)}, "q must be .* and not empty"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    given = {"q": queries(), "lengths": (30, 7), "pool": 10} | changes
    with pytest.raises(UserError, match=f"fluxc::router_pool: {message}"):
        router_pool(given["q"], torch.tensor(given["lengths"]), pool=given["pool"])
