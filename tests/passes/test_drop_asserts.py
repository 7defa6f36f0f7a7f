"""Pass drop-asserts: metadata asserts go, nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxc.ir.graph import calls, runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.drop_asserts import DropAsserts

ASSERT = torch.ops.aten._assert_tensor_metadata


class Casts(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).cos().to(x.dtype)


@pytest.fixture(scope="module")
def casts() -> torch.export.ExportedProgram:
    return torch.export.export(Casts(), (torch.ones(4),))


def test_golden(casts, golden):
    golden.check("casts", program_diff(casts, DropAsserts().apply(casts).program))


def test_asserts_are_counted(casts):
    found = len(calls(casts, ASSERT))
    result = DropAsserts().apply(casts)
    assert found == 2
    assert (result.count, calls(result.program, ASSERT)) == (found, [])


def test_result_takes_what_the_asserts_refused(casts):
    x = torch.ones(4, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="dtype"):
        runnable(casts)(x)
    assert torch.equal(runnable(DropAsserts().apply(casts).program)(x), x.double().cos().float())


def test_nothing_to_drop(casts):
    clean = DropAsserts().apply(casts).program
    again = DropAsserts().apply(clean)
    assert (again.count, again.modified, again.program is clean) == (0, False, True)


def test_input_program_is_unchanged(casts):
    before = program_text(casts)
    DropAsserts().apply(casts)
    assert program_text(casts) == before
