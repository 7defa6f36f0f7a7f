"""Routed models of a known shape over random weights: for measuring speed alone, made without loading anything."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fluxc import kernels, passes
from fluxc.archive import bind_weights
from fluxc.capture.huggingface import unbound_program
from fluxc.engine.traced import TracedPrograms
from fluxc.errors import OptionError
from fluxc.ir.sparse import SparseSettings
from fluxc.model_info import ModelInfo
from fluxc.passes.merge_linears import groups_of
from fluxc.passes.place import Place
from fluxc.plan import CurvePoint, LayerPlan, Plan
from fluxc.weight_files import pack

LABEL = "random weights, speed only"
SPREAD = 0.02
"""Standard deviation of the weights: that of models before training."""
SHARPNESS = 3.0
"""Weight of the norm of q: scores spread enough for an answer to depend on which keys are seen."""
CONTEXT = 1 << 20
"""Positions of the models: more than any prompt that is measured."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model of the Qwen3 family: sizes as in its config, and the sparse kind's sizes in tokens."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    sparse: SparseSettings
    pool: int = 100

    def config(self) -> Any:
        """The transformers config, bf16, embeddings not tied."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            "qwen3",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )


SHAPES = ("qwen3-8b", "tiny")


def shape_of(name: str) -> Shape:
    """The shape called `name`, one of SHAPES; raises OptionError for others."""
    if name == "qwen3-8b":
        return Shape(name, 36, 4096, 32, 8, 128, 12288, 151936, SparseSettings(sink=128, window=2048))
    if name == "tiny":
        return Shape(name, 4, 64, 4, 2, 16, 96, 97, SparseSettings(sink=4, window=28), pool=8)
    raise OptionError(f"shape {name!r} is unknown", hint=f"use one of {', '.join(SHAPES)}")


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """Programs and plan of a shape on one device, as `fluxc.load` makes them."""

    shape: Shape
    device: str
    programs: TracedPrograms
    plan: Plan
    weight_bytes: int

    def bias(self, routes: list[bool]) -> list[float]:
        """route_bias, one a routable layer, that forces `routes`."""
        return [math.inf if full else -math.inf for full in routes]


def random_model(shape: Shape, device: str, seed: int = 0, fuse: bool | None = None) -> RandomModel:
    """Trace the shape without weights, route it, and put random bf16 weights onto the device where it runs.

    The programs are what loading a model.flux of the same model gives: weights that `merge-linears` reads together lie
    together, and every pass of the engine runs. Routers have their first weights; nothing is calibrated.
    `fuse`: see TracedPrograms.
    """
    kernels.register()
    captured = unbound_program(empty_model(shape))
    plan = _plan(ModelInfo.of(captured, {"family": "qwen3", "context": CONTEXT}, LABEL), shape)
    routed = passes.route_pipeline(pool=shape.pool, seed=seed, sparse=shape.sparse).run(captured, "captured").program
    placed = routed if device == "cpu" else _placed(routed, device)
    bound = bind_weights(placed, _weights(placed, device, seed))
    held = sum(tensor.nbytes for tensor in bound.state_dict.values())
    return RandomModel(shape, device, TracedPrograms(bound, context=CONTEXT, fuse=fuse), plan, held)


def empty_model(shape: Shape) -> Any:
    """The transformers model over weights without memory; what RoPE computes once is real."""
    from transformers import AutoModelForCausalLM

    config = shape.config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def fill(tensor: Tensor, name: str, generator: torch.Generator) -> None:
    """Random values in place; norms stay constant, so that nothing grows or vanishes over the layers."""
    if tensor.dim() < 2:
        tensor.fill_(SHARPNESS if "q_norm" in name else 1.0)
    else:
        tensor.normal_(0.0, SPREAD, generator=generator)


def _plan(info: ModelInfo, shape: Shape) -> Plan:
    sizes = shape.sparse
    layers = tuple(LayerPlan(layer, "streaming", sizes.sink, sizes.window) for layer in info.routable)
    curve = tuple(CurvePoint(at, (bias,) * len(layers)) for at, bias in ((0.01, -20.0), (0.99, 20.0)))
    return Plan(info, shape.pool, "sparse", layers, curve, 0.4)


def _placed(program: ExportedProgram, device: str) -> ExportedProgram:
    """The graph on `device`; the empty weights of the trace stay where they are."""
    placed = Place(device, weights=False).apply(program).program
    placed.constants.update({name: value.to(device) for name, value in placed.constants.items()})
    return placed


@torch.no_grad()
def _weights(program: ExportedProgram, device: str, seed: int) -> dict[str, Tensor]:
    """Weights by name on `device`: random ones for those of the trace, the routers as they were drawn."""
    generator = torch.Generator(device).manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, tensor in program.state_dict.items():
        if name.startswith("routers."):
            found[name] = tensor.to(device)
            continue
        found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        fill(found[name], name, generator)
    packed = pack(found, groups_of(program), device)
    del found
    if device != "cpu":
        torch.cuda.empty_cache()
    return packed
