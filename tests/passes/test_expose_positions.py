"""Pass expose-positions: positions made inside become an input, whatever form they take."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import CaptureError
from fluxc.ir.graph import calls, runnable, user_inputs
from fluxc.ir.printer import program_diff
from fluxc.passes.canonicalize_attention import CanonicalizeAttention
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.drop_asserts import DropAsserts
from fluxc.passes.drop_no_ops import DropNoOps
from fluxc.passes.expose_positions import ExposePositions
from fluxc.passes.inline_regions import InlineRegions
from fluxc.testing import causal_attend, foreign_module, foreign_program

FREQUENCY = 100.0 ** -(torch.arange(0, 8, 2) / 8)
SHIFTED = torch.tensor([[0, 1, 2, 3, 4], [9, 10, 11, 12, 13]])


def canonical(module, **options):
    program = foreign_program(module, **options)
    for step in (InlineRegions(), DropAsserts(), DropNoOps(), DeadCode(), CanonicalizeAttention()):
        program = step.apply(program).program
    return program


def turn(x, angles):
    """Rotate halves of x [B,H,S,D] by angles that broadcast to [B,1,S,D/2]."""
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def counts(x, offset=0):
    return torch.arange(offset, offset + x.shape[-2])


def learned(model, hidden, input_ids, padding):
    return hidden + model.learned(counts(hidden))


def learned_in_batches(model, hidden, input_ids, padding):
    positions = torch.arange(input_ids.shape[1]).unsqueeze(0).expand(input_ids.shape[0], -1)
    return hidden + model.learned(positions)


def learned_with_offset(model, hidden, input_ids, padding):
    """As in OPT: counted by the padding mask, two rows of the table unused."""
    positions = (padding.cumsum(1) * padding - 1).long() + 2
    return hidden + model.learned(positions)


def outer(model, x, padding):
    return turn(x, torch.outer(counts(x).float(), model.frequency))


def first_batch_axis(model, x, padding):
    """As in transformers: [1,D/2,1] times [1,1,S], a batch axis of one."""
    positions = counts(x)[None, None, :].float()
    return turn(x, (model.frequency[None, :, None] @ positions).transpose(1, 2).unsqueeze(1))


def table_rows(model, x, padding):
    """A table of all positions, of which the prompt takes the first rows."""
    return turn(x, model.table[: x.shape[2]])


def complex_turn(model, x, padding):
    turns = torch.polar(torch.ones_like(model.table), model.table)[: x.shape[2]]
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, None]).flatten(3)


PLACES = [(learned, False), (learned_in_batches, False), (learned_with_offset, True)]
ROTATIONS = [outer, first_batch_axis, table_rows, complex_turn]


def module_with(place=None, rotate=None):
    table = torch.outer(torch.arange(32.0), FREQUENCY)
    return foreign_module(causal_attend, place=place, rotate=rotate, buffers={"frequency": FREQUENCY, "table": table})


def sliced(rotate):
    return {"longest": 30, "smallest": 2} if rotate in (table_rows, complex_turn) else {}


def check(program, result, *, padding=False):
    """At positions 0..S-1 equal to the program; a row that starts at 9 equal to the end of a longer row."""
    assert user_inputs(result.program) == ("input_ids", "position_ids")
    tokens = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
    plain, exposed = runnable(program), runnable(result.program)
    ones = (torch.ones_like(tokens),) if padding else ()
    with torch.no_grad():
        torch.testing.assert_close(exposed(tokens, torch.arange(5).expand(2, -1)), plain(tokens, *ones))
        shifted = exposed(tokens, SHIFTED)
        alone = exposed(tokens[1:], SHIFTED[1:])
    torch.testing.assert_close(shifted[1:], alone)
    torch.testing.assert_close(shifted[:1], plain(tokens, *ones)[:1])
    return shifted[1]


@pytest.mark.parametrize(("place", "padding"), PLACES, ids=lambda value: getattr(value, "__name__", None))
def test_learned_positions(place, padding):
    module = module_with(place)
    program = canonical(module, padding=padding)
    result = ExposePositions().apply(program)
    assert [note.matched for note in result.notes] == [True]
    shifted = check(program, result, padding=padding)
    offset = 2 if place is learned_with_offset else 0
    rolled = module_with(learned)
    with torch.no_grad():
        rolled.learned.weight.copy_(module.learned.weight.roll(-9 - offset, 0))
        tokens = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(shifted, rolled(tokens)[1])


@pytest.mark.parametrize("rotate", ROTATIONS)
def test_rotary_positions(rotate):
    program = canonical(module_with(rotate=rotate), **sliced(rotate))
    result = ExposePositions().apply(program)
    assert result.count >= 2  # q and k, and the input
    shifted = check(program, result)
    # Rotary embedding is relative: a row alone gives the same wherever it starts.
    with torch.no_grad():
        tokens = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(shifted, runnable(program)(tokens)[1], rtol=1e-4, atol=1e-4)
        jumped = runnable(result.program)(tokens, torch.tensor([[0, 2, 3, 7, 8]] * 2))
    assert not torch.allclose(jumped[1], shifted, atol=1e-3)


def test_golden(golden):
    program = canonical(module_with(rotate=outer))
    golden.check("outer", program_diff(program, ExposePositions().apply(program).program))


def test_positions_without_a_use():
    program = canonical(foreign_module(causal_attend))
    result = ExposePositions().apply(program)
    assert user_inputs(result.program) == ("input_ids", "position_ids")
    assert result.notes == ()


def test_a_program_with_positions_is_left():
    program = ExposePositions().apply(canonical(module_with(rotate=outer))).program
    again = ExposePositions().apply(program)
    assert (again.count, again.program is program) == (0, True)


class Given(torch.nn.Module):
    """A decoder that takes its positions as an input of another name and shape."""

    def __init__(self):
        super().__init__()
        self.inner = foreign_module(causal_attend)

    def forward(self, input_ids, positions, use_cache=False):
        hidden = self.inner.embed(input_ids) + self.inner.learned(positions)
        return self.inner.head(self.inner.norm(hidden + self.inner.layers[0](self.inner, hidden, None)))


@pytest.mark.parametrize("rows", [1, 2])
def test_given_positions_are_renamed_and_constants_removed(rows):
    batch, length = torch.export.Dim("B", min=1), torch.export.Dim("S", min=1)
    inputs = (torch.zeros(2, 12, dtype=torch.long), torch.arange(12).repeat(rows, 1), False)
    positions = {1: length} if rows == 1 else {0: batch, 1: length}
    program = torch.export.export(Given(), inputs, dynamic_shapes=({0: batch, 1: length}, positions, None))
    program = DropNoOps().apply(CanonicalizeAttention().apply(program).program).program
    result = ExposePositions().apply(program)
    assert user_inputs(result.program) == ("input_ids", "position_ids")
    tokens = torch.randint(50, (2, 5))
    with torch.no_grad():
        got = runnable(result.program)(tokens, SHIFTED)
        torch.testing.assert_close(got[1:], runnable(program)(tokens[1:], SHIFTED[1:], False))


def test_the_padding_mask_goes():
    def zeroed(model, hidden, input_ids, padding):
        return hidden * padding.unsqueeze(-1)

    program = canonical(foreign_module(causal_attend, place=zeroed), padding=True)
    result = ExposePositions().apply(program)
    assert user_inputs(result.program) == ("input_ids", "position_ids")
    assert any("all tokens count as valid" in note.reason for note in result.notes)
    check(program, result, padding=True)


def by_length(model, x, padding):
    """Dynamic scaling: the angles change with the prompt's length."""
    return turn(x, torch.outer(counts(x).float() / x.shape[2], model.frequency))


def by_long_length(model, x, padding):
    """The same, past 40 tokens only: numbers past the one in the code show it."""
    positions = counts(x)
    return turn(x, torch.outer(positions.float() * torch.where(positions.max() > 40, 0.5, 1.0), model.frequency))


def by_neighbours(model, hidden, input_ids, padding):
    return hidden + model.learned(counts(hidden)).cumsum(0).flip(0)


def through_a_product(model, hidden, input_ids, padding):
    weights = counts(hidden).float().unsqueeze(0)
    return hidden + (weights @ hidden) * 1e-3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rotate": by_length}, "prompt's length"),
        ({"rotate": by_long_length}, "prompt's length"),
        ({"place": by_neighbours}, "prompt's length"),
        ({"place": through_a_product}, "no sum or product"),
    ],
    ids=["by_length", "by_long_length", "by_neighbours", "through_a_product"],
)
def test_refused(options, reason):
    program = canonical(module_with(**options))
    with pytest.raises(CaptureError, match=rf"node \w+.*{reason}") as caught:
        ExposePositions().apply(program)
    assert caught.value.exit_code == 2


def test_evaluation_changes_no_weight():
    """A program that writes in place is looked at on copies."""

    def writing(model, x, padding):
        return turn(x, torch.outer(counts(x).float(), model.frequency.mul_(2.0)))

    program = canonical(module_with(rotate=writing))
    assert calls(program, torch.ops.aten.mul_)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    assert ExposePositions().apply(program).count
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict.items())
