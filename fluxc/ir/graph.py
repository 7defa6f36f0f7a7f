"""Editing exported programs.

A pass never changes the program it is given: it opens a `Draft` (a copy of the graph over the same weights), edits
the draft, and closes it into a new `ExportedProgram`. Nodes stand in lifted form: every parameter, buffer and constant
is a placeholder, followed by the user inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from fluxc.errors import InternalError


class Draft:
    """An editable copy of a program. Weights are shared with the original; the graph and the signature are not."""

    def __init__(self, program: ExportedProgram) -> None:
        graph = copy.deepcopy(program.graph_module.graph)
        self.module = GraphModule(program.graph_module, graph)
        self.module.meta.update(program.graph_module.meta)
        self.graph: Graph = self.module.graph
        self.input_specs: list[InputSpec] = copy.deepcopy(program.graph_signature.input_specs)
        self.output_specs: list[OutputSpec] = copy.deepcopy(program.graph_signature.output_specs)
        self.state_dict: dict[str, Any] = dict(program.state_dict)
        self.constants: dict[str, Any] = dict(program.constants)
        self.range_constraints = dict(program.range_constraints)
        self._verifiers = program.verifiers

    @property
    def output(self) -> Node:
        """The graph's output node."""
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    def placeholders(self) -> list[Node]:
        """All placeholders: weights first, then user inputs, in signature order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def user_input(self, name: str) -> Node:
        """The placeholder of the user input `name`; raises InternalError if the program has none of that name."""
        for node, spec in zip(self.placeholders(), self.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT and node.name == name:
                return node
        raise InternalError(f"the program has no input {name!r}")

    def add_input(self, name: str, val: torch.Tensor, *, before: str | None = None) -> Node:
        """Add the user input `name` with the fake value `val`, in front of the input `before` (default: last)."""
        at = self._position(before) if before else len(self.input_specs)
        node = self._insert_placeholder(at, name, val)
        self.input_specs.insert(at, InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), None))
        return node

    def add_parameter(self, fqn: str, tensor: torch.Tensor) -> Node:
        """Add the parameter `fqn` (dotted name in the state dict) and return its placeholder."""
        if fqn in self.state_dict:
            raise InternalError(f"the program already has a parameter {fqn!r}")
        at = sum(spec.kind == InputKind.PARAMETER for spec in self.input_specs)
        val = self.fake_mode.from_tensor(tensor, static_shapes=True)
        node = self._insert_placeholder(at, "p_" + fqn.replace(".", "_"), val)
        spec = InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), fqn)
        self.input_specs.insert(at, spec)
        self.state_dict[fqn] = tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, False)
        return node

    def remove_input(self, node: Node) -> None:
        """Remove a placeholder that has no users, with its signature entry and, for a weight, its tensor."""
        index = self.placeholders().index(node)
        spec = self.input_specs.pop(index)
        if spec.target is not None and all(other.target != spec.target for other in self.input_specs):
            self.state_dict.pop(spec.target, None)
            self.constants.pop(spec.target, None)
        self.graph.erase_node(node)

    def set_outputs(self, outputs: list[Node]) -> None:
        """Make `outputs` the program's user outputs, in this order. Programs that mutate inputs are not supported."""
        if any(spec.kind != OutputKind.USER_OUTPUT for spec in self.output_specs):
            raise InternalError("outputs of a program that mutates its inputs cannot be replaced")
        self.output.args = (tuple(outputs),)
        self.output_specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=n.name), None) for n in outputs]

    @property
    def fake_mode(self) -> Any:
        """The fake mode that all `meta["val"]` of this program belong to."""
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor) and hasattr(val, "fake_mode"):
                return val.fake_mode
        raise InternalError("the program has no fake values")

    def call(
        self, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *, name: str = ""
    ) -> Node:
        """Insert a call at the graph's insertion point; `meta["val"]` comes from running the op on fake values.

        `name` (made unique) is what errors, dumps and goldens show; default is the op's own name.
        """
        name = name or getattr(target, "_opname", None)
        return self.refresh(self.graph.create_node("call_function", target, args, kwargs or {}, name=name))

    def refresh(self, node: Node) -> Node:
        """Recompute `meta["val"]` of a call_function node from the fake values of its arguments."""
        args, kwargs = pytree.tree_map_only(Node, _value_of, (node.args, node.kwargs))
        with self.fake_mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        return node

    def inserting_before(self, node: Node, like: Node | None = None) -> Any:
        """Context: new nodes go before `node` and take the module stack of `like` (default `node`)."""
        return _Insertion(self.graph, node, like or node)

    def get_attr(self, name: str, module: torch.nn.Module) -> Node:
        """Attach `module` under `name` (for cond branches) and insert a node that reads it."""
        self.module.add_module(name, module)
        return self.graph.get_attr(name)

    def fix_size(self, node: Node, axis: int, size: int) -> None:
        """Make a symbolic size of an input a constant: in all inputs, all values computed from them, and the ranges."""
        symbol = node.meta["val"].shape[axis]
        if not isinstance(symbol, torch.SymInt):
            return
        expr = symbol.node.expr
        self.range_constraints.pop(expr, None)
        for placeholder in self.placeholders():
            placeholder.meta["val"] = self._with_size(placeholder.meta["val"], expr, size)
        values = [placeholder.meta["val"] for placeholder in self.placeholders()]
        self.module.recompile()
        FakeTensorProp(self.module, self.fake_mode).propagate_dont_convert_inputs(*values)
        self._inline_constant_sizes()

    def _with_size(self, val: Any, expr: Any, size: int) -> Any:
        if not isinstance(val, torch.Tensor) or all(_expr(dim) != expr for dim in val.shape):
            return val
        shape = [size if _expr(dim) == expr else dim for dim in val.shape]
        with self.fake_mode:
            return torch.empty(shape, dtype=val.dtype, device=val.device)

    def _inline_constant_sizes(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_function" and isinstance(node.meta.get("val"), int):
                for user in list(node.users):
                    user.args, user.kwargs = map_arg((user.args, user.kwargs), _constant_of(node))
                self.graph.erase_node(node)

    def remove_dead_code(self) -> int:
        """Erase calls whose results nobody uses; mutating ops and inputs stay. Returns how many went."""
        before = len(self.graph.nodes)
        self.graph.eliminate_dead_code()
        return before - len(self.graph.nodes)

    def close(self) -> ExportedProgram:
        """Check the edits and build the new program."""
        self._sync_names()
        self.graph.lint()
        self.module.recompile()
        return ExportedProgram(
            root=self.module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.input_specs, self.output_specs),
            state_dict=self.state_dict,
            range_constraints=self.range_constraints,
            module_call_graph=self._module_call_graph(),
            example_inputs=None,
            constants=self.constants,
            verifiers=self._verifiers,
        )

    def _position(self, name: str) -> int:
        return self.placeholders().index(self.user_input(name))

    def _insert_placeholder(self, at: int, name: str, val: torch.Tensor) -> Node:
        placeholders = self.placeholders()
        anchor = placeholders[at] if at < len(placeholders) else placeholders[-1].next
        with self.graph.inserting_before(anchor):
            node = self.graph.create_node("placeholder", name, (), {}, name=name)
        node.target = node.name
        node.meta["val"] = val
        return node

    def _sync_names(self) -> None:
        for node, spec in zip(self.placeholders(), self.input_specs, strict=True):
            if isinstance(spec.arg, TensorArgument):
                spec.arg.name = node.name
        for node, out in zip(self.output.args[0], self.output_specs, strict=True):  # type: ignore[arg-type]
            out.arg.name = node.name  # type: ignore[union-attr]

    def _module_call_graph(self) -> list[ModuleCallEntry]:
        from torch.export.exported_program import ModuleCallSignature

        names = [spec.arg.name for spec in self.input_specs if spec.kind == InputKind.USER_INPUT]
        count = sum(spec.kind == OutputKind.USER_OUTPUT for spec in self.output_specs)
        in_spec = pytree.tree_flatten((tuple(range(len(names))), {}))[1]
        out_spec = pytree.tree_flatten(0 if count == 1 else tuple(range(count)))[1]
        signature = ModuleCallSignature([], [], in_spec, out_spec, forward_arg_names=names)
        return [ModuleCallEntry(fqn="", signature=signature)]


class _Insertion:
    """Insertion point whose new nodes copy the module stack of a neighbour, so that layers can be told apart later."""

    def __init__(self, graph: Graph, node: Node, like: Node) -> None:
        self._graph, self._node, self._like = graph, node, like

    def __enter__(self) -> None:
        self._known = set(self._graph.nodes)
        self._point = self._graph.inserting_before(self._node)
        self._point.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._point.__exit__(*exc)
        stack = self._like.meta.get("nn_module_stack")
        for node in self._graph.nodes:
            if stack and node not in self._known and "nn_module_stack" not in node.meta:
                node.meta["nn_module_stack"] = stack


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _constant_of(size: Node) -> Callable[[Node], Any]:
    return lambda node: size.meta["val"] if node is size else node


def _value_of(node: Node) -> Any:
    if "val" not in node.meta:
        raise InternalError(f"node {node.name} has no fake value")
    return node.meta["val"]


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
