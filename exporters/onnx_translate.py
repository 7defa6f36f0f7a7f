"""From an exported program to an ONNX model whose only foreign nodes are calls of functions it carries."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21
from torch.export.exported_program import ExportedProgram
from torch.fx import Node

from fluxc import kernels
from fluxc.errors import CaptureError
from fluxc.exporters.aoti_pieces import cut
from fluxc.exporters.onnx_attention import DOMAIN
from fluxc.exporters.onnx_functions import Functions
from fluxc.exporters.onnx_pieces import translate_pieces
from fluxc.ir.nodes import user_inputs

aten = torch.ops.aten
op: Any = opset21  # its stubs know the types of a graph's text, not of what is traced
_LOGGERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.onnx._internal.exporter._registration")


def translate(
    program: ExportedProgram,
    outputs: Sequence[str],
    axes: Mapping[str, Sequence[str]],
    functions: Functions | None = None,
    attentions: Sequence[Node] = (),
) -> ir.Model:
    """The ONNX model of a prefill or slot-decode program; its weights are views of the program's.

    `outputs` names the results in order; `axes` names the free sizes of inputs, e.g. {"input_ids": ("B", "S")};
    `functions` writes the bodies of fluxc's ops, ONNX Runtime's by default; `attentions`: one node of each layer where
    the program has no attention op. Layers that are alike are translated once.

    Raises CaptureError naming the op that ONNX cannot express.
    """
    kernels.register()
    functions = functions or Functions()
    model = translate_pieces(program, cut(program, outputs, attentions), functools.partial(_translated, functions))
    _attach(model, functions)
    _name_axes(model, axes)
    _drop_origins(model)
    return model


def _translated(functions: Functions, program: ExportedProgram, outputs: Sequence[str]) -> ir.Model:
    """What torch's exporter makes of a program."""
    with quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=functions.opset,
                optimize=True,
                verbose=False,
                output_names=list(outputs),
                input_names=list(user_inputs(program)),
                custom_translation_table={**functions.table(), aten.linear.default: _linear},
            )
        except torch.onnx.errors.OnnxExporterError as cause:
            raise CaptureError(f"the model has an operation that ONNX does not get: {_reason(cause)}") from cause
    assert made is not None
    return made.model


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Gemm reads the weight as it is stored: a tied embedding stays one tensor, none is stored transposed."""
    rows = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), op.Shape(weight, start=1, end=2), axis=0))
    product = op.Gemm(rows, weight, transB=1) if bias is None else op.Gemm(rows, weight, bias, transB=1)
    shape = op.Concat(op.Shape(x, start=0, end=-1), op.Shape(weight, start=0, end=1), axis=0)
    return op.Reshape(product, shape)


def _attach(model: ir.Model, functions: Functions) -> None:
    model.opset_imports[DOMAIN] = 1
    for proto in functions.parsed():
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function


def _name_axes(model: ir.Model, axes: Mapping[str, Sequence[str]]) -> None:
    """Give free sizes the names of `signature.py` in place of torch's symbols."""
    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        for size, name in zip(value.shape or (), axes.get(value.name or "", ()), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value:
                renamed[size.value] = name
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            sizes = [renamed.get(str(d.value), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            value.shape = ir.Shape(sizes)
    for node in model.graph:
        for value in node.outputs:
            if value not in model.graph.outputs:
                value.shape = None  # the runtime infers them; torch's symbols would clash with the new names


def _drop_origins(model: ir.Model) -> None:
    """Forget where torch traced each node: stack traces name files of this machine, and are most of the model."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        values += node.outputs
        node.metadata_props.clear()
        node.doc_string = None
    for value in values:
        value.metadata_props.clear()


def _reason(cause: BaseException) -> str:
    """The innermost cause, on one line."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch's exporter warns of what does not concern this graph (torchvision's ops), and logs every step."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
