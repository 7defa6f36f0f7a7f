"""The program that is trained: the routed one of a model.flux, softened and cut at its layers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fluxc.calibrate.needs import routable_layers
from fluxc.flux_dir import FluxDir
from fluxc.ir.graph import argument, calls
from fluxc.ir.outlined import Outlined
from fluxc.passes import route_pipeline, soften_pipeline, watched
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.outline_layers import OutlineLayers
from fluxc.passes.place import Place
from fluxc.passes.set_dtype import SetDtype
from fluxc.router import RouterSpec, init_router, router_name, with_routers
from fluxc.train.options import TrainOptions


@dataclasses.dataclass(frozen=True)
class Trainable:
    """`module` takes the softened program's inputs; `routers` are its live weights by name in the program.

    `routed` is the program the module was made from, whose routers are still the first ones.
    """

    routed: ExportedProgram
    module: Outlined
    routers: dict[str, nn.Parameter]
    layers: tuple[int, ...]

    def trained(self) -> dict[str, Tensor]:
        """The router weights as they are now, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.routers.items()}

    def with_trained(self) -> ExportedProgram:
        """The routed program with the router weights as they are now."""
        return with_routers(self.routed, {name: p.detach() for name, p in self.routers.items()})


def trainable(flux: FluxDir, options: TrainOptions, device: str = "cpu") -> Trainable:
    """The training program of a model.flux directory on `device`."""
    routed = flux.load("routed", device) if options.dtype is None else _retyped(flux, options.dtype, device)
    if options.start == "fresh":
        routed = with_routers(routed, _on(fresh_routers(routed, options.seed), device))
    return soften(routed, options.straight_through)


def soften(routed: ExportedProgram, straight_through: bool = False) -> Trainable:
    """A routed program, softened, verified and cut at its layers."""
    soft = soften_pipeline(straight_through=straight_through).run(routed, "routed").program
    module = OutlineLayers().apply(soft)
    names = module.parameter_names()
    live = {names[name]: p for name, p in module.named_parameters() if p.requires_grad}
    return Trainable(routed, module, dict(sorted(live.items())), tuple(routable_layers(routed)))


def fresh_routers(routed: ExportedProgram, seed: int) -> dict[str, Tensor]:
    """Untrained weights for all routers of the program, biased to full."""
    pools = calls(routed, torch.ops.fluxc.router_pool)
    state: dict[str, Tensor] = {}
    for layer, node in zip(routable_layers(routed), pools, strict=True):
        spec = RouterSpec(int(node.args[0].meta["val"].shape[-1]), argument(node, "pool"))  # type: ignore[union-attr]
        state |= {router_name(layer) + name: tensor for name, tensor in init_router(spec, seed + layer).items()}
    return state


def _retyped(flux: FluxDir, dtype: str, device: str) -> ExportedProgram:
    """The routed program made anew from the captured one in another dtype: routers stay fp32."""
    passes = (SetDtype(dtype), *route_pipeline(pool=flux.plan.pool).passes, ApplyPlan.of(flux.plan))
    program = watched(passes).run(flux.load("captured"), "captured").program
    program = with_routers(program, flux.routers)
    return program if device == "cpu" else Place(device).apply(program).program


def _on(state: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in state.items()}
