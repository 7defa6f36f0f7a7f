"""The text form: names, sizes, nesting, and the same text for the same graph."""

from __future__ import annotations

import io

import torch

from fluxc.ir.graph import Draft
from fluxc.ir.printer import program_diff, program_text
from fluxc.testing import ToyConfig, toy_program

CONFIG = ToyConfig(windows=(0,))


def test_golden(toy, golden):
    golden.check("toy", program_text(toy(CONFIG)))


def test_text_does_not_depend_on_the_trace(toy):
    assert program_text(toy_program(CONFIG, seed=3)) == program_text(toy(CONFIG))


def test_text_survives_a_file(toy):
    buffer = io.BytesIO()
    torch.export.save(toy(CONFIG), buffer)
    buffer.seek(0)
    assert program_text(torch.export.load(buffer)) == program_text(toy(CONFIG))


def test_text_shows_a_changed_attribute(toy):
    draft = Draft(toy(CONFIG))
    node = next(node for node in draft.graph.nodes if node.name == "attention")
    node.kwargs = {**node.kwargs, "window": 3}
    changed = program_diff(toy(CONFIG), draft.close()).splitlines()
    assert [line[:12] for line in changed if line[0] in "+-"] == ["-  %attentio", "+  %attentio"]
    assert "window=3" in "".join(changed)


def test_sizes_without_a_name_are_numbered():
    class Pad(torch.nn.Module):
        def forward(self, x, y):
            return torch.cat((x, y)), x * 2

    sizes = {0: torch.export.Dim("a"), 1: torch.export.Dim("b")}
    shapes = (sizes, {0: torch.export.Dim("c"), 1: sizes[1]})
    program = torch.export.export(Pad(), (torch.zeros(3, 4), torch.zeros(5, 4)), dynamic_shapes=shapes)
    text = program_text(program)
    assert text.startswith("program(x: f32[d0,d1], y: f32[d2,d1])")
    assert "f32[d0+d2,d1] = cat([%x, %y])" in text
