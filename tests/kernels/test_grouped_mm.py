"""fluxc::grouped_mm against its reference: empty groups, transposed weights, gradients."""

from __future__ import annotations

import pytest
import torch

import fluxc.kernels
from fluxc.errors import UserError
from fluxc.kernels.grouped_mm.op import by_row
from fluxc.kernels.grouped_mm.reference import grouped_mm as reference

fluxc.kernels.register()
op = torch.ops.fluxc.grouped_mm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ENDS = {"even": [2, 4, 6], "empty groups": [0, 6, 6], "one row": [1, 1, 1], "no rows": [0, 0, 0]}


def operands(ends: list[int], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    weight = torch.randn(len(ends), 8, 16).transpose(1, 2)
    return torch.randn(ends[-1], 16).to(dtype), weight.to(dtype), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference(ends: list[int], dtype: torch.dtype) -> None:
    x, weight, limits = operands(ends, dtype)
    torch.testing.assert_close(
        op(x, weight, limits).float(), reference(x, weight, limits), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_row_by_row_equals_reference(ends: list[int]) -> None:
    x, weight, limits = operands(ends)
    torch.testing.assert_close(by_row(x, weight, limits), reference(x, weight, limits))
    more = torch.cat([x, x.new_full((2, 16), torch.nan)])
    assert torch.equal(by_row(more, weight, limits)[len(x) :], x.new_zeros(2, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_can_be_captured(dtype: torch.dtype) -> None:
    x, weight, limits = (tensor.cuda() for tensor in operands(ENDS["empty groups"], dtype))
    op(x, weight, limits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(x, weight, limits)
    limits.copy_(torch.tensor(ENDS["even"]))
    graph.replay()
    want = reference(x.cpu(), weight.cpu(), limits.cpu())
    torch.testing.assert_close(out.cpu().float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_strided_rows() -> None:
    x, weight, ends = operands(ENDS["even"])
    wide = torch.stack([x, x + 1], 1)[:, 0]
    assert not wide.is_contiguous()
    torch.testing.assert_close(op(wide, weight, ends), reference(x, weight, ends))


def test_gradients() -> None:
    x, weight, ends = operands(ENDS["empty groups"])
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, ends), (x, weight))


def test_opcheck() -> None:
    x, weight, ends = operands(ENDS["even"])
    torch.library.opcheck(op, (x.requires_grad_(), weight.contiguous().requires_grad_(), ends))
    torch.library.opcheck(op, (x.detach(), weight, ends))


def test_refuses_what_does_not_fit() -> None:
    x, weight, ends = operands(ENDS["even"])
    with pytest.raises(UserError, match=r"\[T,K\]"):
        op(x[:, :4], weight, ends)
    with pytest.raises(UserError, match="i32"):
        op(x, weight, ends.long())
    with pytest.raises(UserError, match="float16"):
        op(x.half(), weight, ends)
