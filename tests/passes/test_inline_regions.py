"""Pass inline-regions: bodies come out of set-grad and autocast-off regions, also nested ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxc.errors import CaptureError
from fluxc.ir.graph import runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.inline_regions import InlineRegions


class Regions(torch.nn.Module):
    """A set-grad region with two results, one of them from a region inside it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            table = x.cos()
            with torch.enable_grad():
                other = table.sin()
            other = other + table
        return x * table + other


class AutocastOff(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            table = x.cos()
        return x * table


class AutocastOn(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x


def export(module: torch.nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module, (torch.ones(4, 4),))


@pytest.fixture(scope="module")
def regions() -> torch.export.ExportedProgram:
    return export(Regions())


def test_golden(regions, golden):
    golden.check("nested", program_diff(regions, InlineRegions().apply(regions).program))


def test_nested_regions_are_all_inlined(regions):
    result = InlineRegions().apply(regions)
    assert result.count >= 2
    assert "wrap_with" not in program_text(result.program)
    assert list(result.program.graph_module.children()) == [] or result.count == len(result.notes)
    x = torch.randn(4, 4)
    assert torch.equal(runnable(result.program)(x), Regions()(x))


def test_autocast_off_is_inlined():
    program = export(AutocastOff())
    assert "wrap_with_autocast" in program_text(program)
    result = InlineRegions().apply(program)
    assert (result.count, "wrap_with" in program_text(result.program)) == (1, False)
    x = torch.randn(4, 4)
    assert torch.equal(runnable(result.program)(x), AutocastOff()(x))


def test_autocast_on_is_refused():
    with pytest.raises(CaptureError, match=r"torch\.autocast on cpu in torch\.bfloat16"):
        InlineRegions().apply(export(AutocastOn()))


def test_nothing_to_inline(regions):
    flat = InlineRegions().apply(regions).program
    again = InlineRegions().apply(flat)
    assert (again.count, again.modified, again.program is flat) == (0, False, True)


def test_input_program_is_unchanged(regions):
    before = program_text(regions)
    InlineRegions().apply(regions)
    assert program_text(regions) == before
