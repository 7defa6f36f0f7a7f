"""Pass place: every device of a program changes, by this pass alone. `meta` stands in for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fluxc.errors import OptionError
from fluxc.ir.graph import runnable
from fluxc.ir.printer import program_text
from fluxc.passes.place import Place
from fluxc.testing import ToyConfig, toy_inputs


class NamesDevices(torch.nn.Module):
    """Devices in calls, in a buffer, in a constant and in cond branches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.tied = self.linear.weight
        self.table = torch.nn.Buffer(torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        x = x + torch.arange(4, device=x.device) + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        x = torch.cond(flag, lambda y: y + torch.ones(4, device=y.device), lambda y: y - 1, (x,))
        return self.linear(x.to("cpu", torch.float32)) @ self.tied


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(NamesDevices(), (torch.ones(2, 4), torch.tensor(True)))


def devices(program: torch.export.ExportedProgram) -> set[str]:
    """Every device in arguments, fake values, weights and constants, cond branches included."""
    modules = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    found = [*program.state_dict.values(), *program.constants.values()]
    for node in (node for module in modules for node in module.graph.nodes):
        found += torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs), node.meta.get("val")))
    kinds = [item if isinstance(item, torch.device) else item.device for item in found if _has_device(item)]
    return {kind.type for kind in kinds}


def _has_device(item: object) -> bool:
    return isinstance(item, (torch.Tensor, torch.device))


def test_golden(program, golden):
    golden.check("names_devices", program_text(Place("meta").apply(program).program))


def test_every_device_changes(program):
    assert devices(program) == {"cpu"}
    result = Place("meta").apply(program)
    assert result.modified
    assert devices(result.program) == {"meta"}


def test_there_and_back_computes_the_same(program):
    there = Place("meta", weights=False).apply(program).program
    back = Place("cpu").apply(there).program
    x = torch.randn(2, 4)
    assert torch.equal(runnable(back)(x, torch.tensor(True)), runnable(program)(x, torch.tensor(True)))
    assert program_text(back) == program_text(program)


def test_graph_alone_can_go_to_a_device_this_machine_lacks(program):
    result = Place("cuda", weights=False).apply(program)
    tensors = [*result.program.state_dict.values(), *result.program.constants.values()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert "cuda" in devices(result.program)


def test_tied_weights_stay_tied(program):
    moved = Place("meta").apply(program).program.state_dict
    assert moved["linear.weight"] is moved["tied"]


def test_dynamic_sizes_survive(toy):
    program = toy(ToyConfig(windows=(0,)))
    back = Place("cpu").apply(Place("meta", weights=False).apply(program).program).program
    inputs = toy_inputs(batch=1, length=5)
    assert torch.equal(runnable(back)(*inputs), runnable(program)(*inputs))


def test_already_there(program):
    result = Place("cpu").apply(program)
    assert (result.count, result.modified, result.program is program) == (0, False, True)


@pytest.mark.parametrize(("device", "text"), [("gpu", "not a device"), ("cuda:99", "has no device")])
def test_unknown_device(program, device, text):
    with pytest.raises(OptionError, match=text):
        Place(device).apply(program)


def test_input_program_is_unchanged(program):
    before = program_text(program)
    Place("meta").apply(program)
    assert (program_text(program), devices(program)) == (before, {"cpu"})
