"""The one text form of a program: short, deterministic, the same for equal graphs.

    program(input_ids: i64[B,S], ...)
      # layers.0
      %linear : f32[B,S,16] = linear(%x, layers.0.attn.q.weight)
      ...
      return %linear_9

Weights stand by their names where they are used, computed sizes by their value; arguments that equal the schema's
default are left out. Symbolic sizes are B, S, N as in DESIGN section 4, others d0, d1, ... in order of appearance;
`end` is the largest integer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from fluxc.ir.graph import module_path

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_SIZES = (("input_ids", 0, "B"), ("input_ids", 1, "S"), ("logits_at", 1, "N"))
_SYMBOL = re.compile(r"\b[a-z]+\d+\b")
_END = 2**63 - 1
_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")


def program_text(program: ExportedProgram) -> str:
    """The whole program as text, cond branches nested."""
    weights = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind != InputKind.USER_INPUT
    }
    printer = _Printer(weights, _size_names(program.graph))
    return "\n".join(printer.program(program.graph_module)) + "\n"


def module_text(module: GraphModule, name: str, program: ExportedProgram) -> str:
    """A graph module made from parts of `program` as text, in the same form and with the same names of sizes."""
    printer = _Printer({}, _size_names(program.graph))
    return "\n".join(printer.graph(module, name, "")) + "\n"


def program_diff(before: ExportedProgram, after: ExportedProgram) -> str:
    """What changed from one program's text to another's: lines with - and +, one line of context."""
    old, new = program_text(before).splitlines(), program_text(after).splitlines()
    lines = list(difflib.unified_diff(old, new, lineterm="", n=1))[2:]
    return "\n".join("..." if line.startswith("@@") else line for line in lines) + "\n"


class _Printer:
    """One walk over a program; sizes without a name get one when they are first met."""

    def __init__(self, weights: dict[str, str], sizes: dict[str, str]) -> None:
        self._weights, self._sizes = weights, sizes

    def program(self, module: GraphModule) -> Iterator[str]:
        return self.graph(module, "program", "")

    def graph(self, module: GraphModule, name: str, indent: str) -> Iterator[str]:
        inputs = [n for n in module.graph.nodes if n.op == "placeholder" and n.name not in self._weights]
        yield f"{indent}{name}({', '.join(f'{n.name}: {self._type(n)}' for n in inputs)})"
        group: str | None = None
        for node in module.graph.nodes:
            if node.op == "call_function" and not _is_size(node) and not indent and _group(node) != group:
                group = _group(node)
                yield f"{indent}  # {group}"
            yield from (f"{indent}  {line}" for line in self._lines(module, node))

    def _lines(self, module: GraphModule, node: Node) -> Iterator[str]:
        if node.op == "output":
            yield f"return {', '.join(self._value(arg) for arg in _flat(node.args[0]))}"
        elif node.op == "call_function" and not _is_size(node):
            result = f"%{node.name} : {self._type(node)} = " if _has_result(node) else ""
            yield f"{result}{_op_name(node)}({self._arguments(node)})"
            for argument in node.all_input_nodes:
                branch = _submodule(module, argument)
                if branch is not None:
                    yield from self.graph(branch, str(argument.target), "  ")

    def _arguments(self, node: Node) -> str:
        args, kwargs = _without_defaults(node)
        named = [f"{name}={self._value(value)}" for name, value in kwargs.items()]
        return ", ".join([*(self._value(value) for value in args), *named])

    def _value(self, value: Any) -> str:
        if isinstance(value, Node):
            if value.op == "get_attr":
                return str(value.target)
            if _is_size(value):
                return self._size(value.meta["val"])
            return self._weights.get(value.name, f"%{value.name}")
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return _dtype(value)
        return "end" if value == _END and not isinstance(value, float) else str(value)

    def _type(self, node: Node) -> str:
        return self._val_type(node.meta.get("val"))

    def _val_type(self, val: Any) -> str:
        if isinstance(val, torch.Tensor):
            return f"{_dtype(val.dtype)}[{','.join(self._size(dim) for dim in val.shape)}]"
        if isinstance(val, (list, tuple)):
            return f"({', '.join(self._val_type(item) for item in val)})"
        return "?" if val is None else f"{type(val).__name__.removeprefix('Sym').lower()}({self._size(val)})"

    def _size(self, size: Any) -> str:
        if not isinstance(size, torch.SymInt):
            return str(size)
        expr = size.node.expr
        # Named before it is printed: terms then stand in an order that does not depend on the trace.
        names = {symbol: self._symbol(str(symbol)) for symbol in sorted(expr.free_symbols, key=str)}
        renamed = expr.xreplace({old: sympy.Symbol(new, **old.assumptions0) for old, new in names.items()})
        return str(renamed).replace(" ", "")

    def _symbol(self, symbol: str) -> str:
        taken = sum(name.startswith("d") for name in self._sizes.values())
        return self._sizes.setdefault(symbol, f"d{taken}")


def _size_names(graph: Graph) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in graph.nodes:
        for source, axis, name in _SIZES:
            if node.op == "placeholder" and node.name == source and isinstance(node.meta.get("val"), torch.Tensor):
                names.setdefault(str(node.meta["val"].shape[axis]), name)
    return {symbol: name for symbol, name in names.items() if _SYMBOL.fullmatch(symbol)}


def _has_result(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or len(schema.returns) > 0


def _is_size(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), (int, torch.SymInt))


def _group(node: Node) -> str:
    match = _LAYER.match(module_path(node))
    return match[0] if match else "outside layers"


def _op_name(node: Node) -> str:
    target: Any = node.target
    if not hasattr(target, "namespace"):
        return getattr(target, "__name__", str(target))
    name = getattr(target, "_opname", None) or target.name()
    return name if target.namespace in ("aten", "higher_order") else f"{target.namespace}.{name}"


def _without_defaults(node: Node) -> tuple[list[Any], dict[str, Any]]:
    """Arguments that say something, named ones in the schema's order (a saved program keeps no other)."""
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", ())
    defaults = {arg.name: arg.default_value for arg in arguments if arg.has_default_value()}
    names = [arg.name for arg in arguments if arg.name in node.kwargs] or list(node.kwargs)
    kwargs = {name: node.kwargs[name] for name in names}
    missing = object()
    said = {name: value for name, value in kwargs.items() if not _equal(defaults.get(name, missing), value)}
    return list(node.args), said


def _equal(default: Any, value: Any) -> bool:
    return type(default) is type(value) and default == value


def _submodule(module: GraphModule, node: Node) -> GraphModule | None:
    child = getattr(module, str(node.target), None) if node.op == "get_attr" else None
    return child if isinstance(child, GraphModule) else None


def _dtype(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
