"""`fluxc::add_rms_norm` against its reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.add_rms_norm.reference import add_rms_norm as reference
from fluxc.testing import assert_close

kernels.register()
add_rms_norm = torch.ops.fluxc.add_rms_norm


def operands(shape=(2, 3, 10), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return x, residual, torch.rand(shape[-1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (2, 3, 10), (4, 576)])
def test_equals_the_reference(shape, dtype):
    found = add_rms_norm(*operands(shape, dtype), eps=1e-5)
    for mine, wanted in zip(found, reference(*operands(shape, dtype), eps=1e-5), strict=True):
        assert mine.dtype == dtype
        assert_close(mine, wanted)


def test_any_strides():
    x, residual, weight = operands()
    turned = [y.transpose(0, 1).contiguous().transpose(0, 1) for y in (x, residual)]
    found = add_rms_norm(*turned, weight, eps=1e-5)
    assert all(y.is_contiguous() for y in found)
    assert_close(found[0], reference(x, residual, weight, eps=1e-5)[0])


def test_opcheck():
    x, residual, weight = operands()
    torch.library.opcheck(add_rms_norm.default, (x.transpose(0, 1), residual.transpose(0, 1), weight), {"eps": 1e-5})


@pytest.mark.parametrize(("name", "bad"), [("residual", torch.zeros(2, 3, 9)), ("weight", torch.zeros(9))])
def test_bad_input_names_op_and_argument(name, bad):
    given = dict(zip(("x", "residual", "weight"), operands(), strict=True)) | {name: bad}
    with pytest.raises(UserError, match=f"fluxc::add_rms_norm: {name} is"):
        add_rms_norm(**given, eps=1e-5)
