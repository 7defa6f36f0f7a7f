"""Options of `fluxc export` that belong to some targets only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--max-length", type=int, help="Longest prompt with its answer.  [default: the model's context]"),
    click.option("--batch", type=int, help="Most requests of one decode step.  [default: trt 8, others any]"),
    click.option("--opset", type=int, help="onnx: of the standard operators, 18 to 23.  [default: 21]"),
    click.option(
        "--profile",
        type=click.Choice(["ort", "portable"]),
        help="onnx: portable takes standard operators alone.  [default: ort]",
    ),
    click.option(
        "--io",
        type=click.Choice(["engine", "hf"]),
        help="onnx: hf also writes a model with Hugging Face's names and a dense cache.  [default: engine]",
    ),
    click.option("--time-limit", type=float, metavar="SECONDS", help="trt: for each engine.  [default: 3600]"),
    click.option(
        "--attention",
        type=click.Choice(["decomposed", "fused"]),
        help="trt: fused is TensorRT's own attention, experimental.  [default: decomposed]",
    ),
    click.option(
        "--plan",
        type=click.Choice(["conditional", "split"]),
        help="trt: split builds an all-full and an all-sparse engine; the host chooses.  [default: conditional]",
    ),
    click.option(
        "--allow-partial", is_flag=True, default=None, help="trt: also keep an engine with too few conditionals."
    ),
    click.option("--keep-onnx", is_flag=True, default=None, help="trt: keep the ONNX files it was built from."),
)


def target_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command; those that were not given are None."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}
