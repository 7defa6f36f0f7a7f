"""Whether a text is plain arithmetic over size symbols: the grammar of everything torch evaluates in an archive."""

from __future__ import annotations

import ast
import re

_MAX_LENGTH = 8192
_MAX_INTEGER = 2**64
_MAX_EXPONENT = 16

SYMBOL = re.compile(r"(s|u|zf|zuf|ps|i|f)\d{1,6}")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")
_CHARACTERS = re.compile(r"[A-Za-z0-9_ +\-*/%().,<>='\"\[\]&|~]*")
_FLOAT = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[+-]?\d{1,3})?")

_CONSTANTS = frozenset({"true", "false", "oo", "int_oo", "inf", "nan"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
_FUNCTIONS = _POWERS | frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Mod", "Max", "Min", "Abs", "floor", "ceiling",
    "And", "Or", "Not", "Equality", "Unequality", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
    "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
    "FloorDiv", "CleanDiv", "CeilDiv", "FloatTrueDiv", "IntTrueDiv", "PythonMod", "ModularIndexing", "Where", "RShift",
    "CeilToInt", "FloorToInt", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity",
    "IsNonOverlappingAndDenseIndicator",
})  # fmt: skip
_GUARD_FUNCTIONS = frozenset({"max", "min", "abs", "int", "float", "round"})
_GUARD_MODULES = {
    "math": frozenset({"floor", "ceil", "trunc", "sqrt", "isnan", "inf"}),
    "torch": frozenset({"sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite"}),
}
_OPERATORS = (
    ast.Add | ast.Sub | ast.Mult | ast.Div | ast.FloorDiv | ast.Mod | ast.Pow | ast.USub | ast.UAdd | ast.Not
    | ast.And | ast.Or | ast.BitAnd | ast.BitOr | ast.Invert | ast.Eq | ast.NotEq | ast.Lt | ast.LtE | ast.Gt | ast.GtE
)  # fmt: skip


class NotArithmeticError(Exception):
    """Carries the kind of syntax that was found instead."""


def parse_arithmetic(text: str, *, guard: bool) -> None:
    """Raise NotArithmeticError unless `text` is arithmetic; a guard may also read sizes of `L['input']`."""
    if len(text) > _MAX_LENGTH or not _CHARACTERS.fullmatch(text):
        raise NotArithmeticError("length or characters")
    try:
        _Arithmetic(guard).visit(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotArithmeticError(type(error).__name__) from error


class _Arithmetic:
    """Walks a parsed expression and raises at the first thing that is not arithmetic."""

    def __init__(self, guard: bool) -> None:
        self._guard = guard

    def visit(self, node: ast.expr) -> None:
        """Check `node` and everything below it."""
        check = getattr(self, f"_{type(node).__name__.lower()}", None)
        if check is None:
            raise NotArithmeticError(type(node).__name__)
        check(node)

    def _constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) or node.value is None or node.value is Ellipsis:
            raise NotArithmeticError("text")
        if isinstance(node.value, bytes | complex) or abs(node.value) > _MAX_INTEGER:
            raise NotArithmeticError("number")

    def _name(self, node: ast.Name) -> None:
        if node.id not in _CONSTANTS and not SYMBOL.fullmatch(node.id):
            raise NotArithmeticError(node.id)

    def _binop(self, node: ast.BinOp) -> None:
        self._operator(node.op)
        if isinstance(node.op, ast.Pow):
            self._power(node.left, node.right)
        self.visit(node.left)
        self.visit(node.right)

    def _unaryop(self, node: ast.UnaryOp) -> None:
        self._operator(node.op)
        self.visit(node.operand)

    def _boolop(self, node: ast.BoolOp) -> None:
        for value in node.values:
            self.visit(value)

    def _compare(self, node: ast.Compare) -> None:
        for op in node.ops:
            self._operator(op)
        for value in (node.left, *node.comparators):
            self.visit(value)

    def _operator(self, op: ast.AST) -> None:
        if not isinstance(op, _OPERATORS):
            raise NotArithmeticError(type(op).__name__)

    def _call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("Symbol", "Float") and not self._guard:
            return self._literal(name, node)
        if node.keywords or any(isinstance(arg, ast.Starred) for arg in node.args):
            raise NotArithmeticError("keywords")
        if name in _POWERS:
            self._power(*(node.args if len(node.args) == 2 else (node, node)))
        if name not in _FUNCTIONS and not (self._guard and self._guard_function(node)):
            raise NotArithmeticError(f"call of {name}")
        for arg in node.args:
            self.visit(arg)
        return None

    def _literal(self, name: str, node: ast.Call) -> None:
        """`Symbol('s0', positive=True)` and `Float('0.5', precision=53)`."""
        value = node.args[0].value if len(node.args) == 1 and isinstance(node.args[0], ast.Constant) else None
        pattern = SYMBOL if name == "Symbol" else _FLOAT
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise NotArithmeticError(name)
        for keyword in node.keywords:
            given = keyword.value.value if isinstance(keyword.value, ast.Constant) else "?"
            assumption = name == "Symbol" and (given is None or isinstance(given, bool))
            precision = name == "Float" and keyword.arg == "precision" and type(given) is int and 0 < given <= 256
            if keyword.arg is None or not (assumption or precision):
                raise NotArithmeticError(str(keyword.arg))

    def _power(self, base: ast.expr, exponent: ast.expr) -> None:
        """Exponents are small literals and powers do not nest, so that evaluating one cannot take for ever."""
        number = exponent
        if isinstance(number, ast.Call) and getattr(number.func, "id", "") == "Integer" and len(number.args) == 1:
            number = number.args[0]
        if isinstance(number, ast.UnaryOp) and isinstance(number.op, ast.USub):
            number = number.operand
        if not isinstance(number, ast.Constant) or type(number.value) is not int or number.value > _MAX_EXPONENT:
            raise NotArithmeticError("exponent")
        for node in ast.walk(base):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Pow) or name in _POWERS:
                raise NotArithmeticError("nested power")

    def _guard_function(self, node: ast.Call) -> bool:
        func = node.func
        if isinstance(func, ast.Name):
            return func.id in _GUARD_FUNCTIONS
        if not isinstance(func, ast.Attribute):
            return False
        if isinstance(func.value, ast.Name):
            return func.attr in _GUARD_MODULES.get(func.value.id, ())
        return func.attr in ("size", "stride", "storage_offset", "numel") and not node.args and _is_source(func.value)

    def _attribute(self, node: ast.Attribute) -> None:
        if not (self._guard and isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr == "inf"):
            raise NotArithmeticError("attribute")

    def _subscript(self, node: ast.Subscript) -> None:
        """`L['x']` itself (an integer input), or an integer index into `L['x'].size()`."""
        if not self._guard:
            raise NotArithmeticError("subscript")
        if _is_source(node):
            return
        if not isinstance(node.slice, ast.Constant) or type(node.slice.value) is not int:
            raise NotArithmeticError("index")
        if not isinstance(node.value, ast.Call):
            raise NotArithmeticError("subscript")
        self.visit(node.value)


def _is_source(node: ast.expr) -> bool:
    """`L['name']`, with further constant keys or indices behind it."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
        return False
    key = node.slice.value
    plain = bool(NAME.fullmatch(key)) if isinstance(key, str) else type(key) is int
    root = isinstance(node.value, ast.Name) and node.value.id == "L" and isinstance(key, str)
    return plain and (root or _is_source(node.value))
