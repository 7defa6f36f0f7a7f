"""Pass group-experts: torch's grouped product becomes fluxc::grouped_mm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxc.ir.graph import calls, runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.group_experts import GroupExperts

GROUPED = torch.ops.aten._grouped_mm


class Experts(torch.nn.Module):
    def __init__(self, out_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 16, 8).bfloat16())
        self.out_dtype = out_dtype

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x, self.weight.transpose(1, 2), offs=ends, out_dtype=self.out_dtype)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 8).bfloat16(), torch.tensor([2, 2, 6], dtype=torch.int32)


@pytest.fixture(scope="module")
def experts() -> torch.export.ExportedProgram:
    return torch.export.export(Experts(), inputs())


def test_golden(experts, golden):
    golden.check("experts", program_diff(experts, GroupExperts().apply(experts).program))


def test_product_is_rewritten(experts):
    result = GroupExperts().apply(experts)
    assert (result.count, len(calls(experts, GROUPED)), calls(result.program, GROUPED)) == (1, 1, [])
    assert len(calls(result.program, torch.ops.fluxc.grouped_mm)) == 1


def test_values_stay(experts):
    got, want = runnable(GroupExperts().apply(experts).program)(*inputs()), runnable(experts)(*inputs())
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_other_output_dtype_is_refused_with_a_reason():
    program = torch.export.export(Experts(torch.bfloat16), inputs())
    result = GroupExperts().apply(program)
    assert (result.count, result.modified, result.program is program) == (0, False, True)
    assert [(note.matched, "output dtype" in note.reason) for note in result.notes] == [(False, True)]


def test_nothing_to_group(experts):
    done = GroupExperts().apply(experts).program
    again = GroupExperts().apply(done)
    assert (again.count, again.program is done) == (0, True)


def test_input_program_is_unchanged(experts):
    before = program_text(experts)
    GroupExperts().apply(experts)
    assert program_text(experts) == before
