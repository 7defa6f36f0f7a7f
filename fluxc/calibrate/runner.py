"""Running a routed program on one tokenized prompt at a time: losses, routes, scores and exact match."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fluxc.data import TokenizedPrompt


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One prompt through one program.

    loss: mean negative log-likelihood of the scored tokens, nats. exact: every scored token is the likeliest one.
    routes bool[L], scores fp32 [L].
    """

    loss: float
    exact: bool
    routes: Tensor
    scores: Tensor

    @property
    def full_share(self) -> float:
        """Share of the routable layers that ran full attention."""
        return float(self.routes.float().mean())


def program_inputs(prompt: TokenizedPrompt, bias: Tensor) -> tuple[Tensor, ...]:
    """The six inputs of a routed program for one prompt; bias fp32 [L], or [L,N] for the prompt N times."""
    bias = bias[:, None] if bias.dim() == 1 else bias
    device, rows = bias.device, bias.shape[1]
    ids = torch.tensor(prompt.input_ids, device=device).repeat(rows, 1)
    length = ids.shape[1]
    return (
        ids,
        torch.arange(length, device=device).repeat(rows, 1),
        torch.full((rows,), length, device=device),
        torch.full((rows,), prompt.prompt_len, device=device),
        bias.float(),
        torch.tensor(prompt.logits_at, device=device).repeat(rows, 1),
    )


def answer_loss(logits: Tensor, prompt: TokenizedPrompt) -> Tensor:
    """Mean negative log-likelihood of the scored tokens. logits [1,N,V] of the rows `prompt.logits_at`."""
    target = torch.tensor(prompt.answer_ids, device=logits.device)
    return F.cross_entropy(logits[0].float(), target)


def run_prompt(module: torch.nn.Module, prompt: TokenizedPrompt, bias: Tensor) -> Outcome:
    """One forward pass of a runnable routed program under the given bias [L]."""
    return run_biases(module, prompt, bias[:, None])[0]


@torch.no_grad()
def run_biases(module: torch.nn.Module, prompt: TokenizedPrompt, biases: Tensor) -> list[Outcome]:
    """One forward pass over the prompt N times, each row under a bias of its own; biases [L,N]."""
    logits, routes, scores = module(*program_inputs(prompt, biases))
    target = torch.tensor(prompt.answer_ids, device=logits.device)
    found = []
    for row in range(biases.shape[1]):
        exact = bool((logits[row].argmax(-1) == target).all())
        loss = float(answer_loss(logits[row : row + 1], prompt))
        found.append(Outcome(loss, exact, routes[:, row].cpu(), scores[:, row].float().cpu()))
    return found


def forced(routes: Sequence[bool] | Tensor) -> Tensor:
    """The bias [L] that forces these routes whatever the scores are."""
    return torch.tensor([math.inf if full else -math.inf for full in routes])
