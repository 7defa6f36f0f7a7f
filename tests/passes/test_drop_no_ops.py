"""Pass drop-no-ops: identities go, devices lose their names, tied weights are one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxc.ir.graph import calls, runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.drop_asserts import DropAsserts
from fluxc.passes.drop_no_ops import DropNoOps


class NoOps(torch.nn.Module):
    """Every case once, beside a slice and a dropout that do something."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[:, :].to(device=x.device, dtype=torch.float64)
        x = x.to(x.device)
        x = torch.dropout(torch.dropout(x, 0.5, False), 0.0, True)
        return self.second(x.detach().float())[:, 1:]


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    exported = torch.export.export(NoOps(), (torch.ones(3, 4),))
    return DropAsserts().apply(exported).program


@pytest.fixture(scope="module")
def result(program):
    return DropNoOps().apply(program)


def test_golden(program, result, golden):
    golden.check("every_case", program_diff(program, result.program))


def test_identities_are_gone(result):
    targets = [str(node.target) for node in result.program.graph.nodes if node.op == "call_function"]
    assert not any("dropout" in t or "detach" in t for t in targets)
    assert {t for t in targets if "aten.to" in t} == {"aten.to.dtype"}
    assert len(calls(result.program, torch.ops.aten.slice)) == 1


def test_cast_keeps_its_dtype_and_loses_its_device(result):
    casts = [node.args[1] for node in calls(result.program, torch.ops.aten.to.dtype)]
    assert casts == [torch.float64, torch.float64, torch.float32]


def test_tied_weight_is_held_once(program, result):
    assert set(program.state_dict) - set(result.program.state_dict) == {"second.weight"}


def test_values_stay(program, result):
    x = torch.randn(3, 4)
    assert torch.equal(runnable(result.program)(x), runnable(program)(x))


def test_count_is_honest(program, result):
    removed = len(program.graph.nodes) - len(result.program.graph.nodes)
    renamed = 2  # to.device and to.dtype_layout became to.dtype
    assert result.count == removed + renamed


class WritesToConstant(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 2.0]).add_(x)


def test_constant_that_is_written_to_keeps_its_copy():
    written = torch.export.export(WritesToConstant(), (torch.ones(2),))
    run = runnable(DropNoOps().apply(written).program)
    assert torch.equal(run(torch.ones(2)), torch.tensor([2.0, 3.0]))
    assert torch.equal(run(torch.ones(2)), torch.tensor([2.0, 3.0]))


def test_nothing_to_drop(result):
    again = DropNoOps().apply(result.program)
    assert (again.count, again.modified, again.program is result.program) == (0, False, True)


def test_input_program_is_unchanged(program):
    before = program_text(program)
    DropNoOps().apply(program)
    assert program_text(program) == before
