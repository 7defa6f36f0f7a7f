"""The `--device` option."""

from __future__ import annotations

import click

from fluxc.errors import OptionError

device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where to run; a GPU if there is one, else the CPU."
)


def chosen_device(device: str | None) -> str:
    """The device asked for, or the best there is; raises OptionError for a GPU that is not there."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch sees no CUDA device", hint="`fluxc doctor` says why")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
