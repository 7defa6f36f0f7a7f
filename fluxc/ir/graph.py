"""Editing exported programs.

A pass never changes the program it is given: it opens a `Draft` (a copy of the graph over the same weights), edits
the draft, and closes it into a new `ExportedProgram`. Nodes stand in lifted form: every parameter, buffer and constant
is a placeholder, followed by the user inputs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
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
from torch.utils import _pytree as pytree

from fluxc.errors import InternalError
from fluxc.ir.nodes import argument, calls, graph_modules, is_call, module_path, runnable, user_inputs, walk_back

__all__ = [
    "Draft",
    "argument",
    "calls",
    "graph_modules",
    "is_call",
    "module_path",
    "runnable",
    "user_inputs",
    "walk_back",
]


class Draft:
    """An editable copy of a program. Weights are shared with the original; the graph and the signature are not."""

    def __init__(self, program: ExportedProgram) -> None:
        self.module = _copy_module(program.graph_module)
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
        known = name or getattr(target, "_opname", None)
        return self.refresh(self.graph.create_node("call_function", target, args, kwargs or {}, name=known))

    def refresh(self, node: Node) -> Node:
        """Recompute `meta["val"]` of a call_function node from the fake values of its arguments."""
        args, kwargs = pytree.tree_map_only(Node, _value_of, (node.args, node.kwargs))
        # The dispatcher lets ops that torch decomposes (linear on torch 2.11) keep symbolic sizes.
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        return node

    def inserting_before(self, node: Node, like: Node | None = None) -> Any:
        """Context: new nodes go before `node` and take the module stack of `like` (default `node`)."""
        return _Insertion(self.graph, node, like or node)

    def get_attr(self, name: str, module: torch.nn.Module) -> Node:
        """Attach `module` under `name` (for cond branches) and insert a node that reads it."""
        self.module.add_module(name, module)
        return self.graph.get_attr(name)

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
            out.arg.name = node.name

    def _module_call_graph(self) -> list[ModuleCallEntry]:
        from torch.export.exported_program import ModuleCallSignature

        names = [spec.arg.name for spec in self.input_specs if spec.kind == InputKind.USER_INPUT]
        count = sum(spec.kind == OutputKind.USER_OUTPUT for spec in self.output_specs)
        in_spec = pytree.tree_flatten((tuple(range(len(names))), {}))[1]
        out_spec = pytree.tree_flatten(0 if count == 1 else tuple(range(count)))[1]
        signature = ModuleCallSignature([], [], in_spec, out_spec, forward_arg_names=names)
        return [ModuleCallEntry(fqn="", signature=signature)]


def _copy_module(module: GraphModule) -> GraphModule:
    """A graph module over the same tensors with a graph of its own, as have the branches nested in it."""
    copied = GraphModule(module, copy.deepcopy(module.graph))
    copied.meta.update(module.meta)
    for name, child in copied.named_children():
        if isinstance(child, GraphModule):
            setattr(copied, name, _copy_module(child))
    return copied


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


def _value_of(node: Node) -> Any:
    if "val" not in node.meta:
        raise InternalError(f"node {node.name} has no fake value")
    return node.meta["val"]
