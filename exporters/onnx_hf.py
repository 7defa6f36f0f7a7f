"""`--io hf`: one ONNX model with Hugging Face's names and a dense cache, that optimum's loader can generate with.

Prefill (no past) routes each layer as the plan says; later tokens attend to everything, and nothing is evicted.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.export.exported_program import ExportedProgram

from fluxc.errors import InternalError
from fluxc.exporters.onnx_attention import Rows, Triangle, rows_function
from fluxc.exporters.onnx_functions import Functions
from fluxc.exporters.onnx_options import OnnxOptions
from fluxc.exporters.onnx_routed import routed_past_function
from fluxc.exporters.onnx_translate import translate
from fluxc.ir.layers import attention_nodes
from fluxc.passes.insert_past import InsertPast
from fluxc.plan import Plan

FILE = "model.onnx"
CONFIG, GENERATION = "config.json", "generation_config.json"


@dataclasses.dataclass
class PastFunctions(Functions):
    """Attentions whose last query stands at the last key."""

    def first_row(self, q: Any, k: Any) -> Any:
        """i64[1]: how many keys are older than the first query."""
        from onnxscript import opset21 as op

        return op.Sub(op.Shape(k, start=2, end=3), op.Shape(q, start=2, end=3))

    def routed(
        self, full: Rows, sparse: Rows | Triangle, q: Any, k: Any, v: Any, route: Any, prompt_lens: Any, sinks: Any
    ) -> Any:
        """A prompt takes the branch of its route; what follows is full."""
        body = routed_past_function(full, sparse)
        inputs = [q, k, v, route, prompt_lens, self.first_row(q, k), *([] if sinks is None else [sinks])]
        return self._call(f"routed_past_{sparse.name}", body, inputs)

    def full_rows(self, rows: Rows, q: Any, k: Any, v: Any, sinks: Any) -> Any:
        """An attention without a route."""
        inputs = [q, k, v, self.first_row(q, k), *([] if sinks is None else [sinks])]
        return self._call(rows.name, rows_function(rows), inputs)


def hf_model(routed: ExportedProgram, options: OnnxOptions) -> ir.Model:
    """The model; `route_bias` f32[L,1] is an input with the plan's biases as its default value."""
    program = InsertPast().apply(routed).program
    layers = range(len(attention_nodes(program.graph)))
    present = [f"present.{layer}.{name}" for layer in layers for name in ("key", "value")]
    axes: dict[str, tuple[str, ...]] = {"input_ids": ("batch_size", "sequence_length")}
    axes |= {f"past_{name}_{layer}": ("B", "Hk", "past_sequence_length", "D") for layer in layers for name in "kv"}
    model = translate(program, ["logits", *present], axes, PastFunctions(opset=options.opset))
    for value in model.graph.inputs:
        value.name = _hf_name(str(value.name))
    bias = next(value for value in model.graph.inputs if value.name == "route_bias")
    values = np.array(_plan(options).bias(), np.float32)[:, None]
    bias.const_value = ir.tensor(values, name="route_bias")
    model.graph.initializers["route_bias"] = bias
    return model


def _plan(options: OnnxOptions) -> Plan:
    if options.calibrated is None:
        raise InternalError("the hf model needs the plan's biases")
    return options.calibrated


def write_configs(root: Path, options: OnnxOptions, model: ir.Model) -> None:
    """The configuration files that optimum reads: what a cache looks like, and when a text ends."""
    plan, ends = _plan(options), list(options.eos_ids)
    first, logits = plan.model.attentions[0], model.graph.outputs[0]
    assert logits.shape is not None
    config = {
        "model_type": plan.model.family,
        "hidden_size": first.heads * first.key_dim,
        "head_dim": first.key_dim,
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
        "num_hidden_layers": len(plan.model.attentions),
        "vocab_size": logits.shape[-1],
        "use_cache": True,
    }
    limits = {"max_position_embeddings": plan.model.context} if plan.model.context else {}
    (root / CONFIG).write_text(json.dumps(config | limits, indent=1), encoding="utf-8")
    tokens = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {}
    (root / GENERATION).write_text(json.dumps(tokens), encoding="utf-8")


def _hf_name(name: str) -> str:
    """past_k_3 -> past_key_values.3.key"""
    if not name.startswith("past_"):
        return name
    _, kind, layer = name.split("_")
    return f"past_key_values.{layer}.{'key' if kind == 'k' else 'value'}"
