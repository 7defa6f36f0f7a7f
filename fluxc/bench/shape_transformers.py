"""Decode steps of transformers' own generate with a static cache and torch.compile, over the same shape."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from fluxc.bench.shape_model import Shape, empty_model, fill
from fluxc.bench.shape_rows import Row
from fluxc.runtime.clock import Timing

WARM_STEPS = 8
"""Steps that compile, choose kernels and record graphs."""


@torch.no_grad()
def transformers_row(shape: Shape, device: str, length: int, steps: int, seed: int = 0) -> Row:
    """Seconds a greedy step takes after a prompt of `length` tokens, batch 1. Compiled on a GPU alone."""
    model = random_transformers(shape, device, seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, shape.vocabulary, (1, length), generator=generator).to(device)
    stamps = _Stamps()
    begin = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=WARM_STEPS + steps + 1,
        do_sample=False,
        cache_implementation="static",
        streamer=stamps,
        pad_token_id=0,
        **_compiled(device),
    )
    taken = [later - earlier for earlier, later in zip(stamps.at, stamps.at[1:], strict=False)]
    return {
        "length": length,
        "batch": 1,
        "attention": model.config._attn_implementation,
        "compiled": device != "cpu",
        "first_token": stamps.at[1] - begin,
        "step": dataclasses.asdict(Timing.of(taken[-steps:])),
    }


@torch.no_grad()
def random_transformers(shape: Shape, device: str, seed: int) -> Any:
    """The transformers model with random weights on `device`."""
    model = empty_model(shape).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        fill(parameter, name, generator)
    model.generation_config.eos_token_id = None  # an answer ends with its last step
    return model


def _compiled(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"disable_compile": True}
    from transformers import CompileConfig

    return {"compile_config": CompileConfig(mode="reduce-overhead", fullgraph=False)}


class _Stamps:
    """A streamer that notes when each token was on the host; the prompt comes first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        """A token, or the prompt, has come."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""
