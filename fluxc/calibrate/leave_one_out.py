"""Leaving out the FA of one layer at a time: the exact cost of each layer's sparsity on one prompt.

It costs a forward pass a layer, from that layer on (what comes before is kept), where the first-order needs cost six
passes for all layers together. It checks their ranking and corrects it on the prompts it is run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.export.exported_program import ExportedProgram

from fluxc.calibrate.runner import answer_loss, forced, program_inputs
from fluxc.data import TokenizedPrompt
from fluxc.passes.outline_layers import OutlineLayers


@torch.no_grad()
def leave_one_out(
    program: ExportedProgram,
    prompt: TokenizedPrompt,
    base: Sequence[bool],
    advance: Callable[[], None] = lambda: None,
    device: str = "cpu",
) -> Tensor:
    """Rise of the answer loss, in nats, when one full layer of the routes `base` [L] goes sparse; fp32 [L].

    Layers that are sparse in `base` get 0.
    """
    outlined = OutlineLayers().apply(program)
    state = outlined.start(*program_inputs(prompt, forced(base).to(device)))
    rises = torch.zeros(len(base))
    routed = [index for index, interface in enumerate(outlined.interfaces) if interface.route]
    for index, layer in enumerate(routed):
        state = outlined.advance(state, layer)
        if base[index]:
            without = outlined.with_inputs(state, route_bias=_without(base, index).to(device))
            rises[index] = float(answer_loss(outlined.finish(without)[0], prompt))
        advance()
    return torch.where(torch.tensor(list(base)), rises - float(answer_loss(outlined.finish(state)[0], prompt)), 0.0)


def _without(base: Sequence[bool], index: int) -> Tensor:
    return forced([full and other != index for other, full in enumerate(base)])[:, None]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors of the same length, nan where one is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, tied values sharing their mean rank."""
    less = (values[:, None] > values[None, :]).sum(1)
    same = (values[:, None] == values[None, :]).sum(1)
    return less + (same - 1) / 2.0
