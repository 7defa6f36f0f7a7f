"""Reading programs: which nodes call what, with which arguments, traced where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

from fluxc.errors import InternalError


def user_inputs(program: ExportedProgram) -> tuple[str, ...]:
    """Names of the user inputs in order."""
    return tuple(s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT)


def runnable(program: ExportedProgram) -> torch.nn.Module:
    """The program as an eager module over the same weights, without the exporter's input guards.

    Inputs are positional, in signature order; one output comes back as itself, several as a tuple.
    """
    return program.module(check_guards=False)


def graph_modules(module: GraphModule) -> Iterator[GraphModule]:
    """`module` and every graph module nested in it (cond branches), outermost first."""
    yield module
    for child in module.children():
        if isinstance(child, GraphModule):
            yield from graph_modules(child)


def calls(program_or_module: ExportedProgram | GraphModule, target: Any) -> list[Node]:
    """Nodes that call `target` (an op packet or overload), in graph order, cond branches included."""
    module = program_or_module if isinstance(program_or_module, GraphModule) else program_or_module.graph_module
    return [node for gm in graph_modules(module) for node in gm.graph.nodes if is_call(node, target)]


def is_call(node: Any, target: Any) -> bool:
    """Whether `node` is a call of the overload `target`, or of any overload of the packet `target`."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return node.target is target or packet is target


def module_path(node: Node) -> str:
    """Dotted path of the innermost module the node was traced in, "" where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def argument(node: Node, name: str, default: Any = None) -> Any:
    """The value of a fluxc/aten op's argument by its schema name, wherever it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for index, arg in enumerate(schema.arguments):
        if arg.name == name:
            if index < len(node.args):
                return node.args[index]
            return arg.default_value if arg.has_default_value() else default
    raise InternalError(f"{node.target} has no argument {name!r}")


def walk_back(node: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
    """Every node that `node` depends on, nearest first, not going past nodes for which `stop` holds."""
    seen: set[Node] = set()
    queue = [node]
    while queue:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            queue.extend(current.all_input_nodes)
