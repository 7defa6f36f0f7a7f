"""The check after capturing somebody else's program: it computes what the program did before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fluxc.capture.foreign_export import fixed_inputs, logits_output, vocabulary
from fluxc.capture.selfcheck import LENGTHS, TOLERANCE
from fluxc.errors import SelfCheckError
from fluxc.ir.graph import Draft, runnable
from fluxc.ir.roles import read_roles

_CROSSABLE = 512  # windows up to this many tokens are crossed by one more length


class Original:
    """The program as it was given, called by the meaning of its inputs."""

    def __init__(self, program: ExportedProgram) -> None:
        draft = Draft(program)
        self._roles = read_roles(draft)
        self._logits = logits_output(draft, self._roles)
        self._inputs = fixed_inputs(program)
        self._in_spec = program.call_spec.in_spec
        self._module = runnable(program)
        self.takes_padding = self._roles.padding is not None
        self.vocabulary = vocabulary(program)
        self.shortest, self.longest = _range(program, self._roles.length)

    def __call__(self, tokens: Tensor, lens: Tensor) -> Tensor:
        """Logits [B,S,V] in fp32; `lens` [B] is used where the program takes a padding mask."""
        leaves = [value[0] if isinstance(value, tuple) else self._tensor(value, tokens, lens) for value in self._inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self._in_spec)
        with torch.no_grad():
            result = self._module(*args, **kwargs)
        return pytree.tree_leaves(result)[self._logits].float()

    def _tensor(self, name: str, tokens: Tensor, lens: Tensor) -> Tensor:
        roles, index = self._roles, torch.arange(tokens.shape[1])
        if roles.padding is not None and name == roles.padding.name:
            return (index < lens.unsqueeze(1)).to(roles.padding.meta["val"].dtype)
        if roles.arange is not None and name == roles.arange.name:
            return index.to(roles.arange.meta["val"].dtype)
        if roles.positions is not None and name == roles.positions.name:
            val = roles.positions.meta["val"]
            return index.to(val.dtype).expand(1 if val.shape[0] == 1 else tokens.shape[0], -1)
        return tokens.to(roles.tokens.meta["val"].dtype)


def check_program(
    program: ExportedProgram, original: Original, dtype: torch.dtype, windows: list[int]
) -> dict[str, Any]:
    """Compare on random tokens; returns {"lengths", "max_error", "tolerance"}.

    Full rows at each length, padded rows where the original takes a mask, and at every length the first rows again
    alone (batch 1, and length 1), which for a causal program change nothing. Errors are relative to the largest
    logit. Raises SelfCheckError naming the length.
    """
    module, tolerance, worst = runnable(program), TOLERANCE.get(dtype, 1e-4), 0.0
    lengths = _lengths(original, windows)
    for length in lengths:
        error = max(_errors(module, original, length))
        if not error <= tolerance:
            raise SelfCheckError(
                f"the rewritten program differs from the given one by {error:.2e} of the largest logit at length "
                f"{length} (tolerance {tolerance:.0e})"
            )
        worst = max(worst, error)
    return {"lengths": lengths, "max_error": worst, "tolerance": tolerance}


def _lengths(original: Original, windows: list[int]) -> list[int]:
    wanted = [*LENGTHS, *(window + 3 for window in windows if 0 < window <= _CROSSABLE)]
    longest = original.longest or max(wanted)
    return sorted({min(max(length, original.shortest, 2), longest) for length in wanted})


def _errors(module: torch.nn.Module, original: Original, length: int) -> list[float]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(original.vocabulary, (2, length), generator=generator)
    lens = torch.tensor([length, max(1, length // 2) if original.takes_padding else length])
    want = original(tokens, lens)
    got = _run(module, tokens, lens)
    valid = torch.arange(length) < lens.unsqueeze(1)
    scale = want[valid].abs().max().clamp_min(1e-30)
    errors = [((got - want).abs()[valid].max() / scale).item()]
    for part in sorted({1, length // 2, length}):
        alone = _run(module, tokens[:1, :part], torch.tensor([part]))
        errors.append(((alone - want[:1, :part]).abs().max() / scale).item())
    return errors


def _run(module: torch.nn.Module, tokens: Tensor, lens: Tensor) -> Tensor:
    rows = torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1)
    with torch.no_grad():
        return module(tokens, rows, lens, rows).float()


def _range(program: ExportedProgram, symbol: Any) -> tuple[int, int | None]:
    """Smallest and largest length the program was exported for; None where there is no largest."""
    bounds = program.range_constraints.get(symbol)
    if bounds is None:
        return 1, None
    longest = int(bounds.upper) if bounds.upper.is_Integer and int(bounds.upper) < 2**31 else None
    return max(int(bounds.lower), 1), longest
