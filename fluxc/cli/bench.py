"""`fluxc bench`: measurements, checked before they are timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from fluxc.cli.budgets import budget_options
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.errors import OptionError

OF_KERNELS = {name: f"--{name}" for name in ("flex", "variants", "rounds", "threads", "clock")} | {"suites": "--suite"}
OF_MODELS = {"batches": "--batch", "new_tokens": "--new-tokens", "repeats": "--repeats", "crossover": "--crossover"}


@command(
    "bench",
    examples="""
    fluxc bench model.flux
    fluxc bench model.flux --length 4096 --batch 1 --batch 8 --sparse-ratio 0.6
    fluxc bench engine-onnx --length 2048
    fluxc bench kernels --suite decode --length 8192 -o decode.json
    fluxc bench --compare before.json after.json
    """,
)
@click.argument("what", required=False, metavar="MODEL|kernels")
@click.option("--compare", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Compare two stored results.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is a GPU.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(1), help="Tokens; again for more.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Answers at a time (models).")
@click.option("--new-tokens", type=click.IntRange(2), help="Tokens of each answer (models).  [default: 32]")
@click.option("--repeats", type=click.IntRange(1), help="Timed runs of each kind (models).  [default: 3]")
@click.option("--crossover/--no-crossover", default=None, help="Measure the crossover first (models).  [default: yes]")
@budget_options
@click.option("--suite", "suites", multiple=True, help="One of the device's suites; again for more (kernels).")
@click.option("--flex", is_flag=True, default=None, help="Also compile FlexAttention (kernels, GPU, minutes).")
@click.option("--variants", is_flag=True, default=None, help="Also other tile sizes (kernels, GPU).")
@click.option("--rounds", type=click.IntRange(1), help="Times each contender runs (kernels, CPU).  [default: 7]")
@click.option("--threads", type=int, help="Torch threads; 0 leaves torch's choice (kernels, CPU).")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), help="cpu: this process only (kernels, CPU).")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Raw JSON.  [models: NAME.bench.json]")
def bench(
    screen: Screen,
    what: str | None,
    compare: tuple[Path, Path] | None,
    device: str | None,
    output: Path | None,
    budget: float | None,
    **options: Any,
) -> None:
    """Measure a model.flux folder, an engine folder or the kernels against what you would use instead.

    MODEL: prefill and decode against dense, at forced Ω (--sparse-ratio, --budget) and as the routers choose, each
    speed-up beside its ideal and its bound; crossover, KV bytes, router, memory. What is compared takes turns in one
    process.

    kernels: every op against SDPA and others, by device.

    Before anything is timed it is checked; where the check is red, no times are shown.
    """
    if compare:
        return _compare(screen, *compare)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    lengths = given.pop("lengths", ())
    if what is None:
        raise OptionError("say what to measure", hint="a model.flux or engine folder, or kernels")
    _check(what, given)
    if what == "kernels":
        return _kernels(screen, device, output, lengths, given)
    return _model(screen, Path(what), device, output, {**given, "lengths": lengths, "budget": budget})


def _check(what: str, given: dict[str, Any]) -> None:
    """Raise OptionError for options of the other kind of benchmark."""
    others = OF_MODELS if what == "kernels" else OF_KERNELS
    names = ", ".join(option for name, option in others.items() if name in given)
    if names:
        raise OptionError(f"{names} does not go with {what}", hint="`fluxc bench --help` says what goes with what")


def _kernels(screen: Screen, device: str | None, output: Path | None, lengths: Any, given: dict[str, Any]) -> None:
    from fluxc.cli.bench_tables import kernel_tables
    from fluxc.kernels.bench.suites import BenchOptions, conditions, run

    asked = BenchOptions(lengths=lengths, **given)
    where = device or _device()
    found: dict[str, Any] = {"conditions": conditions(where, asked), "rows": []}
    for row in run(where, asked):
        found["rows"].append(row)
        if output:
            output.write_text(json.dumps(found, indent=1) + "\n")
    screen.show(*kernel_tables(found["rows"]))
    screen.result(found)


def _model(screen: Screen, path: Path, device: str | None, output: Path | None, given: dict[str, Any]) -> None:
    from fluxc.atomic import atomic_file
    from fluxc.bench.frame import FrameOptions, measure
    from fluxc.cli.bench_tables import model_tables
    from fluxc.cli.devices import chosen_device
    from fluxc.cli.outputs import check_folder

    target = output or path.absolute().with_name(f"{path.absolute().stem}.bench.json")
    check_folder(target)
    budget = given["budget"]
    # A budget asks for routes that are forced to it, and for those that the routers choose under it.
    asked = {**given, "sparse_ratio": None if budget is None else round(1 - budget, 9)}
    found = measure(path, chosen_device(device), FrameOptions(**asked), screen.progress())
    with atomic_file(target, force=True) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    screen.show(*model_tables(found), f"raw numbers: {target}")
    screen.result(found)


def _compare(screen: Screen, first: Path, second: Path) -> None:
    from fluxc.bench.compare import compare
    from fluxc.cli.bench_tables import comparison

    pairs = compare(first, second)
    screen.show(comparison(pairs))
    screen.result({"pairs": [dataclasses.asdict(pair) | {"ratio": pair.ratio} for pair in pairs]})


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
