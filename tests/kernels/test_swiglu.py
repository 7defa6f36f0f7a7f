"""`fluxc::swiglu` against its reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.swiglu.reference import swiglu as reference
from fluxc.testing import assert_close

kernels.register()
swiglu = torch.ops.fluxc.swiglu


def operands(shape=(2, 3, 10), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 3, 10)])
def test_equals_the_reference(shape, dtype):
    assert_close(swiglu(*operands(shape, dtype)), reference(*operands(shape, dtype)))


def test_halves_of_one_projection():
    merged = torch.cat(operands(), -1)
    gate, up = merged.chunk(2, -1)
    out = swiglu(gate, up)
    assert out.is_contiguous()
    assert_close(out, reference(gate, up))


def test_opcheck():
    torch.library.opcheck(swiglu.default, tuple(torch.cat(operands(), -1).chunk(2, -1)))


@pytest.mark.parametrize("up", [torch.zeros(2, 3, 9), torch.zeros(2, 3, 10).half()])
def test_bad_input_names_op_and_argument(up):
    with pytest.raises(UserError, match="fluxc::swiglu: up is"):
        swiglu(operands()[0], up)
