"""Proving by evaluation that a mask is causal.

A mask counts as causal when its values depend on shapes, positions and a padding input alone, and evaluating it at
several sizes gives causal, causal within a constant window, or that and key padding. Sizes are chosen past every whole
number the mask's code mentions, because a window shows only beyond itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from fluxc.ir.evaluate import Evaluator, NotEvaluableError, backward_slice, depends_on, mentioned_numbers, weights_of
from fluxc.ir.graph import Draft, is_call
from fluxc.ir.roles import Roles

aten = torch.ops.aten
_SMALL = ((2, 5), (1, 9), (3, 2), (2, 24))  # (batch, length)
_MENTIONED_FROM, _DIRECT_TO = 16, 4096  # numbers this large are tried; up to here with the whole square
_BLOCKED = -1e4  # an added value this low takes a key out of the softmax, in every dtype


class MaskRefusedError(Exception):
    """Why a mask is not one fluxc represents."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """One mask: `node` is boolean (True: seen), or `added` to the scores; `inverted`: boolean, True is not seen."""

    node: Node
    inverted: bool = False


@dataclasses.dataclass(frozen=True)
class _Case:
    """Sizes and padding [B,S] of one evaluation; `index`: stand-ins for the tokens 0..S-1 that are looked at."""

    batch: int
    length: int
    padding: Tensor
    start: int = 0
    index: Tensor | None = None

    @property
    def tokens(self) -> Tensor:
        return torch.arange(self.length) if self.index is None else self.index


def prove_causal(draft: Draft, roles: Roles, masks: list[Mask], is_causal: bool) -> int:
    """The window of the masks together (0: none); raises MaskRefusedError with the reason if they are not causal.

    `is_causal`: the op itself adds the causal mask.
    """
    for mask in masks:
        _check_sources(mask.node, roles)
    window = 0
    for case in _cases(draft, roles, masks):
        seen = _seen(draft, roles, masks, is_causal, case)
        window = window or _window(seen, case)
        _check(seen, case, window)
    return window


def _check_sources(node: Node, roles: Roles) -> None:
    if depends_on(node, [roles.tokens]):
        raise MaskRefusedError("its mask depends on which tokens are in the prompt, not on positions alone")


def _cases(draft: Draft, roles: Roles, masks: list[Mask]) -> Iterator[_Case]:
    numbers, limit = _numbers(draft, masks)
    for batch, length in _SMALL:
        yield from _paddings(batch, min(length, limit), roles)
    for number in sorted(numbers):
        if number <= _DIRECT_TO:
            length = min(number + 3, limit)
            yield _Case(1, length, torch.ones(1, length, dtype=torch.bool))
        else:
            yield _sampled(number)
    if _MENTIONED_FROM < limit <= _DIRECT_TO:
        yield _Case(1, limit, torch.ones(1, limit, dtype=torch.bool))


def _paddings(batch: int, length: int, roles: Roles) -> Iterator[_Case]:
    full = torch.ones(batch, length, dtype=torch.bool)
    yield _Case(batch, length, full)
    if roles.positions is not None:
        yield _Case(batch, length, full, start=7)
    if roles.padding is not None:
        index = torch.arange(length)
        lens = 1 + torch.arange(batch).flip(0) % length
        yield _Case(batch, length, index < lens.unsqueeze(1))  # right padding
        yield _Case(batch, length, index >= length - lens.unsqueeze(1))  # left padding
        yield _Case(batch, length, (index % 3 != 1).expand(batch, -1))  # holes


def _sampled(number: int) -> _Case:
    """A few tokens whose distances lie around `number`, instead of all."""
    near, last = range(number - 4, number + 5), range(2 * number - 8, 2 * number + 1)
    index = sorted({0, 1, 2, 3, *near, *last})
    return _Case(1, len(index), torch.ones(1, len(index), dtype=torch.bool), index=torch.tensor(index))


def _numbers(draft: Draft, masks: list[Mask]) -> tuple[set[int], int]:
    """Whole numbers the masks mention (windows), and the length of the shortest table they read."""
    weights = weights_of(draft)
    nodes = {n for mask in masks for n in backward_slice(mask.node)}
    tables = [weights[node].shape[-1] for node in nodes if node in weights and weights[node].dim() >= 2]
    limit = min(tables, default=2**31)
    return {n for n in mentioned_numbers(nodes) if _MENTIONED_FROM < n < limit}, limit


def _seen(draft: Draft, roles: Roles, masks: list[Mask], is_causal: bool, case: _Case) -> Tensor:
    """Whether query i sees key j: bool [B,H,S,S]."""
    tokens = case.tokens
    seen = torch.ones(1, 1, case.length, case.length, dtype=torch.bool)
    if is_causal:
        seen = seen & (tokens.unsqueeze(0) <= tokens.unsqueeze(1))
    evaluate = Evaluator(draft, roles.sizes(case.batch, case.length), _given(roles, masks, case))
    for mask in masks:
        try:
            value = evaluate(mask.node)
        except (NotEvaluableError, RuntimeError, IndexError, TypeError, ValueError, AssertionError) as error:
            raise MaskRefusedError(f"its mask cannot be evaluated ({_line(error)})") from error
        seen = seen & _as_seen(value, mask)
    return seen.expand(case.batch, -1, -1, -1)


def _given(roles: Roles, masks: list[Mask], case: _Case) -> dict[Node, Tensor]:
    given: dict[Node, Tensor] = {}
    if roles.padding is not None:
        given[roles.padding] = case.padding.to(roles.padding.meta["val"].dtype)
    if roles.positions is not None:
        positions = (case.tokens + case.start).expand(case.batch, -1)
        given[roles.positions] = positions.to(roles.positions.meta["val"].dtype)
    if roles.arange is not None:
        given[roles.arange] = case.tokens
    if case.index is not None:
        given.update(_sampled_counts(roles, masks, case.index))
    return given


def _sampled_counts(roles: Roles, masks: list[Mask], index: Tensor) -> dict[Node, Tensor]:
    """Every count 0..S-1 replaced by the sample; refuses masks that use the length in another way."""
    counts: dict[Node, Tensor] = {}
    for node in {n for mask in masks for n in backward_slice(mask.node)}:
        if is_call(node, aten.arange) and node.meta["val"].shape[0] == roles.tokens.meta["val"].shape[1]:
            counts[node] = index.to(node.meta["val"].dtype)
        elif is_call(node, aten.tril) or is_call(node, aten.triu):
            raise MaskRefusedError("its mask has a window too wide to be tried out")
    return counts


def _as_seen(value: Tensor, mask: Mask) -> Tensor:
    if value.dtype == torch.bool:
        seen = ~value if mask.inverted else value
    else:
        seen = value == 0
        if mask.inverted or not bool((seen | (value <= _BLOCKED)).all()):
            raise MaskRefusedError("its mask adds a bias to the scores (ALiBi or a relative bias), which is no mask")
    while seen.dim() < 4:
        seen = seen.unsqueeze(0)
    return seen


def _window(seen: Tensor, case: _Case) -> int:
    """The window that the last row of an unpadded case shows, 0 for none."""
    last = seen[0, 0, -1]
    if not bool(case.padding.all()) or bool(last.all()) or not bool(last.any()):
        return 0
    return int((case.tokens[-1] - case.tokens)[last].max()) + 1


def _check(seen: Tensor, case: _Case, window: int) -> None:
    """Compare with causal and window, with or without key padding, in all rows that a valid token asks from."""
    distance = case.tokens.unsqueeze(1) - case.tokens.unsqueeze(0)
    causal = (distance >= 0) & (distance < window if window else distance >= 0)
    padded = causal.unsqueeze(0) & case.padding.unsqueeze(1)
    rows = (case.padding & padded.any(-1)).unsqueeze(1).expand(-1, seen.shape[1], -1)
    if not any(torch.equal(seen[rows], _like(mask, seen)[rows]) for mask in (padded, causal.unsqueeze(0))):
        raise MaskRefusedError(_difference(seen, distance, rows))


def _like(mask: Tensor, seen: Tensor) -> Tensor:
    return mask.unsqueeze(1).expand_as(seen)


def _difference(seen: Tensor, distance: Tensor, rows: Tensor) -> str:
    if bool((seen & (distance < 0))[rows].any()):
        return "its mask lets tokens see later ones (an encoder, or a prefix that is bidirectional)"
    return "its mask is causal, but not with one constant window (blocks, documents, or a pattern)"


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
