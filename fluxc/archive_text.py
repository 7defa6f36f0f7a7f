"""Which texts of a saved program are harmless.

torch evaluates several strings of an archive: size expressions go through sympy's `eval`, guards and names of inputs
are pasted into Python source that is executed, operator names are looked up by attribute, parameter paths become
attribute code. Each of them has a grammar here; a text outside its grammar is refused, so nothing is evaluated that is
not plain arithmetic, a plain name or a known operator.
"""

from __future__ import annotations

import re

from fluxc.archive_arithmetic import NAME, SYMBOL, NotArithmeticError, parse_arithmetic
from fluxc.errors import ArchiveError

_MAX_TEXT = 100_000

_DOTTED = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,63}")

# Python attributes such as __class__ are reached the same way as operators; these are operators.
_BIT_OPS = re.compile(r"__i?(and|or|xor|lshift|rshift)__")
_NAMESPACES = ("aten", "prims", "fluxc")
_HIGHER_ORDER = frozenset({"cond", "wrap_with_set_grad_enabled", "wrap_with_autocast"})
# These read or write files, or print: not arithmetic, whoever asks for them.
_FORBIDDEN_OPS = frozenset({"from_file", "save", "_save", "_print", "Print", "warn", "raise", "RaiseException"})
_PYTHON_OPS = frozenset({
    "_operator.add", "_operator.sub", "_operator.mul", "_operator.floordiv", "_operator.truediv", "_operator.mod",
    "_operator.pow", "_operator.neg", "_operator.pos", "_operator.eq", "_operator.ne", "_operator.lt", "_operator.le",
    "_operator.gt", "_operator.ge", "_operator.and_", "_operator.or_", "_operator.not_", "_operator.xor",
    "_operator.lshift", "_operator.rshift", "_operator.getitem", "math.trunc", "math.floor", "math.ceil", "math.sqrt",
    "torch.sym_int", "torch.sym_float", "torch.sym_max", "torch.sym_min", "torch.sym_not", "torch.sym_ite",
    "torch.sym_sqrt", "torch.sym_sum",
})  # fmt: skip


def check_name(text: str) -> None:
    """A node or argument name: one identifier. torch pastes input names into source that it executes."""
    if text and not NAME.fullmatch(text):
        raise ArchiveError(f"the archive holds code where a name belongs: {_short(text)}", hint=_HOSTILE)


def check_path(text: str) -> None:
    """A dotted parameter or module path. torch turns it into attribute access in generated source."""
    if text and not _DOTTED.fullmatch(text):
        raise ArchiveError(f"the archive holds code where a parameter name belongs: {_short(text)}", hint=_HOSTILE)


def check_symbol(text: str) -> None:
    """The name of a size symbol, such as s0 or u3."""
    if not SYMBOL.fullmatch(text):
        raise ArchiveError(f"the archive names an unknown size symbol {_short(text)}", hint=_HOSTILE)


def check_operator(text: str) -> None:
    """An operator a graph may call: aten, prims, fluxc, three higher-order ones and Python's arithmetic."""
    if text in _PYTHON_OPS:
        return
    parts = text.split(".")
    if parts[:2] != ["torch", "ops"] or len(parts) not in (4, 5) or not all(map(NAME.fullmatch, parts)):
        raise ArchiveError(f"the archive calls {_short(text)}, which is no tensor operator", hint=_HOSTILE)
    namespace, name = parts[2], parts[3]
    if namespace == "higher_order":
        allowed = name in _HIGHER_ORDER and len(parts) == 4
    else:
        dunder = any(part.startswith("__") for part in parts[3:]) and not _BIT_OPS.fullmatch(name)
        allowed = namespace in _NAMESPACES and name not in _FORBIDDEN_OPS and not dunder
    if not allowed:
        known = f"operators of {', '.join(_NAMESPACES)} and {', '.join(sorted(_HIGHER_ORDER))} are read"
        raise ArchiveError(f"the archive calls the operator {_short(text)}, which fluxc does not load", hint=known)


def check_free_text(text: str) -> None:
    """Text that is only ever data (string arguments, type names): one line of printable characters."""
    if len(text) > _MAX_TEXT or not (text.isprintable() or not text):
        raise ArchiveError(f"the archive holds unprintable or oversized text {_short(text)}", hint=_HOSTILE)


def check_expression(text: str) -> None:
    """A size expression: plain arithmetic over symbols, in the form torch writes or in infix form."""
    _check_arithmetic(text, guard=False)


def check_guard(text: str) -> None:
    """A guard: a comparison of arithmetic over `L['input'].size()[i]`."""
    _check_arithmetic(text, guard=True)


_HOSTILE = "do not load it; ask for a program saved with torch.export.save"


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else text[:57] + "...")


def _check_arithmetic(text: str, *, guard: bool) -> None:
    try:
        parse_arithmetic(text, guard=guard)
    except NotArithmeticError as error:
        kind = "guard" if guard else "size expression"
        raise ArchiveError(
            f"the archive holds a {kind} that is not arithmetic: {_short(text)}", hint=_HOSTILE
        ) from error
