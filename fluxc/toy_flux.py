"""A complete model.flux directory of the toy decoder, made in a second: for tests of artifacts, runtime and CLI."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from fluxc.artifact import FluxDir, write_flux
from fluxc.ir.sparse import SparseSettings
from fluxc.model_info import ModelInfo
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.route_attention import RouteAttention
from fluxc.plan import CurvePoint, LayerPlan, Plan
from fluxc.toy_decoder import ToyConfig, toy_program
from fluxc.weight_files import weights_digest

META: dict[str, Any] = {"family": "toy", "context": 256}
TOY = ToyConfig(windows=(0, 16, 0))
SPARSE = SparseSettings(sink=4, window=12)


def toy_routed(captured: ExportedProgram, sparse: SparseSettings = SPARSE) -> ExportedProgram:
    """The captured program with routers (first weights) and routed attention."""
    return RouteAttention(sparse=sparse).apply(InsertRouters(pool=8).apply(captured).program).program


def flat_plan(info: ModelInfo, budget: float = 0.4, sparse: SparseSettings = SPARSE, **changes: Any) -> Plan:
    """A plan whose biases depend on the budget alone: -20 in every layer at 0.01, 20 at 0.99."""
    sizes = {name: value for name, value in sparse.to_dict().items() if name != "decode_full"}
    layers = tuple(LayerPlan(layer, **sizes) for layer in info.routable)
    curve = tuple(CurvePoint(at, (bias,) * len(layers)) for at, bias in ((0.01, -20.0), (0.99, 20.0)))
    decode: Any = "full" if sparse.decode_full else "sparse"
    return dataclasses.replace(Plan(info, 8, decode, layers, curve, budget), **changes)


def toy_flux(path: Path, captured: ExportedProgram | None = None, **options: Any) -> FluxDir:
    """The model.flux of a captured toy program (default: TOY); `options` go to write_flux."""
    return flux_of(path, captured or toy_program(TOY), META, **options)


def flux_of(path: Path, captured: ExportedProgram, meta: dict[str, Any], **options: Any) -> FluxDir:
    """Write and open the model.flux of any captured program, with first router weights and `flat_plan`."""
    info = ModelInfo.of(captured, meta, weights_digest(captured.state_dict))
    return write_flux(path, captured, toy_routed(captured), flat_plan(info), meta, **options)
