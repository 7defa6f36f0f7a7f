"""Pass `expose-positions`: gives a program the input position_ids in place of positions it makes itself."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from fluxc.errors import CaptureError
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.positions import find_tables
from fluxc.ir.remake import Lift
from fluxc.ir.roles import Roles, read_roles

aten = torch.ops.aten
_NAME = "position_ids"


@dataclasses.dataclass(frozen=True)
class ExposePositions(Pass):
    """Add the input position_ids [B,S] and make every table of positions from it.

    1. Counts [B,S] made inside (arange, a cumulative sum of the padding mask): position_ids itself.
    2. Counts [S] or [1,S]: position_ids as one vector [B*S]; the table made of it is cut into batches where it meets
       the tokens.
    3. The first S rows of a constant table: the rows that the same vector selects.
    4. A program that has position_ids keeps it, under this name.

        %t   = cos(arange(S) * %freq)           %t'  = cos(reshape(%position_ids, [-1]) * %freq)
        %out = mul(%q, unsqueeze(%t))      =>   %out = mul(%q, reshape(unsqueeze(%t'), [B, 1, S, D]))

    Old and new tables are compared on numbers before the new ones are used. Raises CaptureError where a table depends
    on more than each token's position, or meets the tokens other than element by element. Inputs that only masks and
    positions needed (attention_mask, cache_position) are removed.
    """

    name: ClassVar[str] = "expose-positions"
    runs_after: ClassVar[tuple[str, ...]] = ("canonicalize-attention",)

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Returns the number of tables made anew and of inputs added or removed."""
        roles = read_roles(draft)
        tables = find_tables(draft, roles)
        positions = _positions(draft, roles)
        lift = Lift(draft, roles, positions)
        for table in tables:
            notes.append(Note(table.node.name, True, lift.apply(table)))
        draft.remove_dead_code()
        return len(tables) + _use_input(draft, roles, positions) + _remove_others(draft, roles, notes)


def _positions(draft: Draft, roles: Roles) -> Node:
    """The input position_ids [B,S] (case 4: a program's own of that name)."""
    given = roles.positions
    if given is not None and given.name == _NAME and given.meta["val"].shape[0] != 1:
        return given
    if given is not None and given.name == _NAME:
        given._rename("given_position_ids")
        given.target = given.name
    with draft.fake_mode:
        val = torch.empty_like(roles.tokens.meta["val"], dtype=torch.int64)
    return draft.add_input(_NAME, val)


def _use_input(draft: Draft, roles: Roles, positions: Node) -> int:
    """Case 4 for an input of another name or shape; what is left of it are sizes."""
    if roles.positions is positions:
        return 0
    if roles.positions is not None:
        roles.positions.replace_all_uses_with(positions)
        draft.remove_input(roles.positions)
    return 1


def _remove_others(draft: Draft, roles: Roles, notes: list[Note]) -> int:
    """Take sizes from the tokens, put ones for what still reads the padding mask, and remove the inputs left over."""
    sized = {node: node.meta["val"].dim() for node in (roles.padding, roles.arange) if node is not None}
    for node in sized:
        for user in list(node.users):
            if is_call(user, aten.sym_size):
                axis = int(user.args[1]) if sized[node] == 2 else 1  # type: ignore[arg-type]
                user.args = (roles.tokens, axis)
                draft.refresh(user)
    if roles.padding is not None and roles.padding.users:
        notes.append(Note(roles.padding.name, True, "all tokens count as valid where the padding mask is still read"))
        _put_ones(draft, roles, roles.padding)
    others = (*sized, *roles.constants)
    for node in others:
        if node.users:
            raise CaptureError(f"the input {node.name} is used by node {next(iter(node.users)).name} as well")
        draft.remove_input(node)
    return len(others)


def _put_ones(draft: Draft, roles: Roles, padding: Node) -> None:
    first = next(node for node in draft.graph.nodes if node.op != "placeholder")
    with draft.inserting_before(first):
        keywords = {"dtype": padding.meta["val"].dtype}
        ones = draft.call(aten.ones_like.default, (roles.tokens,), keywords)
    padding.replace_all_uses_with(ones)
