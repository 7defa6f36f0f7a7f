"""The last step for somebody else's program: only the logits of chosen rows, and the captured signature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

from fluxc.errors import CaptureError
from fluxc.ir.evaluate import depends_on, written_arguments
from fluxc.ir.graph import Draft, is_call, runnable, walk_back
from fluxc.ir.roles import Roles, read_roles
from fluxc.signature import CAPTURED_INPUTS

aten = torch.ops.aten
# Sizes of the example inputs: different from each other and from 0 and 1, which the exporter treats apart.
_B, _S, _N = 2, 8, 3
_ROW_BY_ROW = (
    aten.mul, aten.div, aten.tanh, aten.to, aten._to_copy, aten.add, aten.sub, aten.contiguous, aten.clone, aten.clamp,
)  # fmt: skip
_WITH_LOGITS = "export the model with its language-model head, returning logits [B,S,V] of every token"


def check_frozen(program: ExportedProgram) -> None:
    """Raise CaptureError, naming the buffer or input, if running the program changes it."""
    for spec in program.graph_signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
            raise CaptureError(
                f"the program writes to {spec.target} (a cache kept inside the model?)",
                hint="export the model without its cache (use_cache=False)",
            )
        if spec.kind != OutputKind.USER_OUTPUT:
            raise CaptureError(f"the program has an output of kind {spec.kind.name}", hint=_WITH_LOGITS)


def check_writes(program: ExportedProgram) -> None:
    """Raise CaptureError, naming it, if a call of the graph writes to a weight, a buffer or an input in place."""
    names = {spec.arg.name: spec.target or spec.arg.name for spec in program.graph_signature.input_specs}
    for node in program.graph.nodes:
        for written in written_arguments(node):
            source = _base(written)
            if source.op == "placeholder":
                raise CaptureError(
                    f"the program writes to {names.get(source.name, source.name)} while it runs (node {node.name})",
                    hint="export the model without its cache (use_cache=False), with RoPE that does not change",
                )


def _base(node: Node) -> Node:
    """The tensor whose memory `node` may be."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema: Any = getattr(node.target, "_schema", None)
        shares = schema is not None and any(r.alias_info for r in schema.returns)
        if not shares and not is_call(node, aten.to):
            break
        node = node.args[0]
    return node


def logits_output(draft: Draft, roles: Roles) -> int:
    """Index of the output that is the logits [B,S,V]; raises CaptureError where there is none."""
    shapes = []
    for index, node in enumerate(draft.output.args[0]):  # type: ignore[arg-type]
        val = node.meta.get("val") if isinstance(node, Node) else None
        if isinstance(val, Tensor) and val.is_floating_point():
            shapes.append(tuple(map(str, val.shape)))
            if _is_logits(val, roles):
                return index
    raise CaptureError(f"the program returns no logits of every token (its outputs: {shapes})", hint=_WITH_LOGITS)


def only_logits(program: ExportedProgram) -> ExportedProgram:
    """The program with the logits as its one output."""
    draft = Draft(program)
    outputs: Any = draft.output.args[0]
    draft.set_outputs([outputs[logits_output(draft, read_roles(draft))]])
    draft.remove_dead_code()
    return draft.close()


def vocabulary(program: ExportedProgram) -> int:
    """Rows of the token embedding."""
    draft = Draft(program)
    return _embedding(read_roles(draft).tokens).shape[0]


def _is_logits(val: Tensor, roles: Roles) -> bool:
    if val.dim() != 3 or not isinstance(val.shape[1], torch.SymInt) or val.shape[1].node.expr not in roles.lengths:
        return False
    rows, width = _embedding(roles.tokens).shape
    return val.shape[2] != width or rows == width


def _lookup(node: Node, tokens: Node) -> bool:
    index: Any = node.args[1]
    return depends_on(index, [tokens])


def _embedding(tokens: Node) -> Tensor:
    for node in tokens.graph.nodes:
        if is_call(node, aten.embedding) and _lookup(node, tokens):
            table: Any = node.args[0]
            return table.meta["val"]
    raise CaptureError(f"the program does not look up the tokens {tokens.name} in an embedding", hint=_WITH_LOGITS)


def export_captured(program: ExportedProgram, longest: int | None) -> ExportedProgram:
    """Export again with inputs CAPTURED_INPUTS: B, S, N free from 1 (S up to `longest`), logits of rows logits_at.

    `program` takes tokens and position_ids and returns logits [B,S,V]. The rows are taken before the vocabulary's
    linear layer where only element-wise work follows it, else from the logits. Raises CaptureError with the
    exporter's reason where the program holds for some sizes only.
    """
    tokens = read_roles(Draft(program)).tokens.name
    module = _with_signature(runnable(program), tokens)
    length = Dim("S", min=1) if longest is None else Dim("S", min=1, max=longest)
    B, N = Dim("B", min=1), Dim("N", min=1)
    shapes = ({0: B, 1: length}, {0: B, 1: length}, {0: B}, {0: B, 1: N})
    try:
        return torch.export.export(module, _examples(), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the exporter raises many types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"the program does not hold for every batch and length from 1: {reason}",
            hint="export it with a free batch and length, without padding to blocks",
        ) from error


def _examples() -> tuple[Tensor, ...]:
    positions = torch.arange(_S).expand(_B, _S).contiguous()
    return torch.zeros_like(positions), positions, torch.full((_B,), _S), torch.zeros(_B, _N, dtype=torch.long)


def _with_signature(module: Any, tokens: str) -> GraphModule:
    """The unlifted graph with new placeholders, and the gather of rows."""
    graph: Graph = module.graph
    old = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    new = _placeholders(graph, next(iter(graph.nodes)))
    for source, name in ((tokens, "input_ids"), ("position_ids", "position_ids")):
        old[source].replace_all_uses_with(new[name])
        graph.erase_node(old[source])
    for name in CAPTURED_INPUTS:
        new[name]._rename(name)
    _gather_rows(graph, new["logits_at"])
    graph.set_codegen(CodeGen())
    module._forward_pre_hooks.clear()  # they check the old inputs
    graph.lint()
    module.recompile()
    return module


def _placeholders(graph: Graph, first: Node) -> dict[str, Node]:
    with graph.inserting_before(first):
        return {name: graph.create_node("placeholder", name, name=f"new_{name}") for name in CAPTURED_INPUTS}


def _gather_rows(graph: Graph, logits_at: Node) -> None:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (logits,) = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    head = _head(logits)
    reader: Node = output if head is None else head
    value: Any = logits if head is None else head.args[0]
    with graph.inserting_before(reader):
        width = graph.call_function(aten.sym_size.int, (value, 2))
        index = graph.call_function(aten.unsqueeze.default, (logits_at, -1))
        index = graph.call_function(aten.expand.default, (index, [-1, -1, width]))
        rows = graph.call_function(aten.gather.default, (value, 1, index))
    if head is not None:
        head.replace_input_with(value, rows)
    output.args = (rows if head is None else logits,)


def _head(logits: Node) -> Node | None:
    """The vocabulary's linear layer, walking back through element-wise work by numbers; None if it is not found."""
    node = logits
    while not (is_call(node, aten.linear) or is_call(node, aten.matmul)):
        sources = node.all_input_nodes
        if len(sources) != 1 or not any(is_call(node, op) for op in _ROW_BY_ROW):
            return None
        node = sources[0]
    weight = node.args[1]
    constant = all(source.op != "placeholder" for source in walk_back(weight, lambda _: False))  # type: ignore[arg-type]
    return node if constant and len(node.args[0].meta["val"].shape) == 3 else None  # type: ignore[union-attr]


def fixed_inputs(program: ExportedProgram) -> list[Any]:
    """The user inputs in order: names of tensors, and the values of constants in a tuple."""
    found: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            found.append((spec.arg.value,) if hasattr(spec.arg, "value") else spec.arg.name)
    return found
