"""The Layer Router (METHOD section 1): its shape, its first weights, and its weights inside a program.

Pooled queries [B,D] pass the context encoder (Linear d->8d, SiLU, Linear 8d->2d) and the head (Linear 2d->4d, SiLU,
4d->d, SiLU, d->2); the two logits are full and sparse, in this order. Weights are fp32 whatever the model's dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export.exported_program import ExportedProgram

from fluxc.errors import OptionError, PlanError
from fluxc.ir.graph import Draft
from fluxc.options import Options

PREFIX = "routers."
POOL = 100
FULL_BIAS = 4.5  # of the head's logit for full, so that an untrained router keeps the layer dense


@dataclasses.dataclass(frozen=True)
class RouterSpec(Options):
    """`width`: head dimension d of the layer's queries. `pool`: tokens pooled at each end of the prompt."""

    width: int = 128
    pool: int = POOL

    def __post_init__(self) -> None:
        if self.width < 1 or self.pool < 1:
            raise OptionError(f"router width {self.width}, pool {self.pool} cannot be used", hint="Both are at least 1")

    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each linear layer by name, in the order they run."""
        d = self.width
        return {
            "encoder.0": (d, 8 * d),
            "encoder.2": (8 * d, 2 * d),
            "head.0": (2 * d, 4 * d),
            "head.2": (4 * d, d),
            "head.4": (d, 2),
        }


def init_router(spec: RouterSpec, seed: int) -> dict[str, Tensor]:
    """First weights of one router, fp32, by LayerRouter state-dict name: uniform in 1/sqrt(inputs), biased to full."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, (inputs, outputs) in spec.linears().items():
        bound = 1 / math.sqrt(inputs)
        for suffix, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            state[f"{name}.{suffix}"] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    state["head.4.bias"] = torch.tensor([FULL_BIAS, 0.0])
    return state


class LayerRouter(nn.Module):
    """The router of one layer as a plain module: what fitting trains and tests compare with."""

    def __init__(self, spec: RouterSpec, seed: int = 0) -> None:
        super().__init__()
        linear = {name: nn.Linear(*sizes) for name, sizes in spec.linears().items()}
        self.encoder = nn.Sequential(linear["encoder.0"], nn.SiLU(), linear["encoder.2"])
        self.head = nn.Sequential(linear["head.0"], nn.SiLU(), linear["head.2"], nn.SiLU(), linear["head.4"])
        self.load_state_dict(init_router(spec, seed))

    def forward(self, pooled: Tensor) -> Tensor:
        """pooled fp32 [...,D] -> logits fp32 [...,2], full first."""
        return self.head(self.encoder(pooled))

    def score(self, pooled: Tensor) -> Tensor:
        """pooled fp32 [...,D] -> logit[full] - logit[sparse], fp32 [...]."""
        logits = self(pooled)
        return logits[..., 0] - logits[..., 1]


def router_name(layer: int) -> str:
    """Prefix of the parameters of the router of the attention `layer`, dot included."""
    return f"{PREFIX}{layer}."


def router_state(program: ExportedProgram) -> dict[str, Tensor]:
    """All router weights of a program by parameter name (`routers.<layer>.encoder.0.weight`, ...)."""
    return {name: tensor for name, tensor in program.state_dict.items() if name.startswith(PREFIX)}


def layer_state(state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of one layer's router by LayerRouter state-dict name, from a state of all routers."""
    prefix = router_name(layer)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def with_routers(program: ExportedProgram, state: Mapping[str, Tensor]) -> ExportedProgram:
    """The program with these router weights, everything else shared. `state` may hold some of the routers only.

    Raises PlanError for a weight the program does not have, or of another shape.
    """
    draft = Draft(program)
    for name, tensor in state.items():
        _check_fits(name, tensor, program)
        draft.state_dict[name] = nn.Parameter(tensor.detach().float(), requires_grad=False)
    return draft.close()


def _check_fits(name: str, tensor: Tensor, program: ExportedProgram) -> None:
    known = program.state_dict.get(name) if name.startswith(PREFIX) else None
    if known is None:
        raise PlanError(f"the program has no router weight {name!r}", hint="These routers belong to another model")
    if known.shape != tensor.shape:
        raise PlanError(
            f"router weight {name!r} has shape {list(tensor.shape)}, the program needs {list(known.shape)}",
            hint="These routers belong to another model",
        )
