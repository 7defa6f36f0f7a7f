"""Fitting the Layer Routers to measured needs in closed form, a layer at a time, without running the model.

A router's score is the logarithm of the need it expects of its layer, given the pooled queries: Poisson regression
with a log link and ridge penalty. The expectation matters, not the likeliest case: a prompt that may be a retrieval
keeps the layers retrieval needs. The paper trains the same networks end to end (section 3.2), which takes thousands of
prompts; a linear score generalises from tens, and is embedded exactly, because silu(x) - silu(-x) = x.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxc.router import RouterSpec, init_router

_LINEARS = ("encoder.0", "encoder.2", "head.0", "head.2", "head.4")
_SILU_AFTER = frozenset({"encoder.0", "head.0", "head.2"})


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """`ridge`: penalty on the weights of standardised queries, in units of one sample of mean need."""

    ridge: float = 30.0
    iterations: int = 40
    seed: int = 0


def fit_routers(
    features: Tensor, needs: Tensor, weights: Tensor, spec: RouterSpec, options: FitOptions
) -> list[dict[str, Tensor]]:
    """Fit one router per layer.

    features fp32 [N,L,D] (pooled queries), needs fp32 [N,L] > 0 (nats), weights fp32 [N] (how much each sample
    counts). Returns L state dicts with the names of `fluxc.router.LayerRouter`; scores come out as ln(nats).
    """
    weights = weights.double() * weights.numel() / weights.double().sum()
    routers = []
    for layer in range(features.shape[1]):
        slope, offset = _regress(features[:, layer].double(), needs[:, layer].double(), weights, options)
        routers.append(linear_router(slope, offset, spec, options.seed + layer))
    return routers


def linear_router(slope: Tensor, offset: float, spec: RouterSpec, seed: int) -> dict[str, Tensor]:
    """A router whose score is exactly `slope . pooled + offset`; slope [D].

    Units the linear score does not use keep random input weights and zero output weights, so that training can take
    them into use.
    """
    state = init_router(spec, seed)
    last = spec.linears()["head.4"][0]
    for name in ("encoder.2", "head.0", "head.2", "head.4"):
        state[f"{name}.weight"].zero_()
        state[f"{name}.bias"].zero_()
    width = spec.width
    eye = torch.eye(width)
    state["encoder.0.weight"][: 2 * width] = torch.cat([eye, -eye])
    state["encoder.0.bias"][: 2 * width] = 0
    state["encoder.2.weight"][:width, : 2 * width] = torch.cat([eye, -eye], dim=1)
    scale = float(slope.abs().max()) or 1.0
    state["head.0.weight"][0, :width] = (slope / scale).float()
    state["head.0.weight"][1, :width] = (-slope / scale).float()
    state["head.2.weight"][:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    state["head.4.weight"][:, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * (scale / 2)
    state["head.4.bias"].copy_(torch.tensor([offset / 2, -offset / 2]))
    spare = init_router(spec, seed)
    state["head.0.weight"][2:] = spare["head.0.weight"][2:]
    state["head.2.weight"][2:last] = spare["head.2.weight"][2:last]
    return state


def scores_of(routers: list[dict[str, Tensor]], features: Tensor) -> Tensor:
    """Scores fp32 [N,L] of pooled queries [N,L,D] under the given routers."""
    stacked = {name: torch.stack([router[name] for router in routers]) for name in routers[0]}
    x = features.transpose(0, 1)
    for name in _LINEARS:
        x = torch.baddbmm(stacked[f"{name}.bias"][:, None], x, stacked[f"{name}.weight"].transpose(1, 2))
        if name in _SILU_AFTER:
            x = F.silu(x)
    return (x[..., 0] - x[..., 1]).T


def _regress(x: Tensor, needs: Tensor, weights: Tensor, options: FitOptions) -> tuple[Tensor, float]:
    """Slope [D] and offset of ln E[need | x], by Newton's method with halved steps. All in fp64."""
    mean = (x * weights[:, None]).sum(0) / weights.sum()
    std = (((x - mean).square() * weights[:, None]).sum(0) / weights.sum()).sqrt()
    std = std + 1e-2 * std.mean().clamp_min(1e-6)
    level = float((needs * weights).sum() / weights.sum())
    design = torch.cat([(x - mean) / std, torch.ones_like(x[:, :1])], dim=1)
    penalty = torch.full((design.shape[1],), options.ridge, dtype=torch.float64)
    penalty[-1] = 1e-6
    solution = _newton(design, needs / level, weights, penalty, options.iterations)
    slope = solution[:-1] / std
    return slope, float(solution[-1]) + torch.tensor(level).log().item() - float(slope @ mean)


def _newton(design: Tensor, target: Tensor, weights: Tensor, penalty: Tensor, iterations: int) -> Tensor:
    def objective(w: Tensor) -> float:
        score = (design @ w).clamp(-30, 30)
        return float((weights * (score.exp() - target * score)).sum() + 0.5 * (penalty * w * w).sum())

    w = torch.zeros(design.shape[1], dtype=torch.float64)
    best = objective(w)
    for _ in range(iterations):
        rate = weights * (design @ w).clamp(-30, 30).exp()
        gradient = design.T @ (rate - weights * target) + penalty * w
        step = torch.linalg.solve((design * rate[:, None]).T @ design + penalty.diag(), gradient)
        length = 1.0
        while length > 1e-4 and objective(w - length * step) > best:
            length /= 2
        w = w - length * step
        now = objective(w)
        if best - now < 1e-9 * abs(best):
            break
        best = now
    return w
