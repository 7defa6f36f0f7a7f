"""`fluxc train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table
from fluxc.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.train.api import Prepared, Trained
    from fluxc.train.options import TrainOptions


@command(
    "train",
    edits=True,
    examples="""
    fluxc train model.flux
    fluxc train model.flux --data mix.jsonl --target kv=0.7 --target local=0.95
    fluxc train model.flux --preset paper --device cuda --dtype bfloat16
    fluxc train model.flux --steps 20 --dry-run
    torchrun --nproc-per-node 4 -m fluxc train model.flux
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="JSONL (prompt, answer, task), or a datasets folder.")
@click.option("--preset", default="fast", show_default=True, metavar="fast|paper", help="paper: Flux Attention's own.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--batch", type=int, help="Prompts a step.")
@click.option("--micro-tokens", type=int, help="Padded tokens that run at once.")
@click.option("--prompts", type=int, help="Prompts to generate where no data are given.")
@click.option("--length", type=int, help="Tokens of generated prompts.")
@click.option("--target", "targets", multiple=True, metavar="TASK=Ω", help="Ω of a task or group; may be repeated.")
@click.option("--start", metavar="calibrated|fresh", help="Which routers to start from.")
@click.option("--router-lr", type=float, help="Learning rate of the routers.")
@click.option("--distill", type=float, metavar="SHARE", help="Share of the loss that compares with dense logits.")
@click.option("--straight-through", is_flag=True, default=None, help="Hard routes with soft gradients.")
@click.option("--dtype", metavar="float32|bfloat16", help="Of the frozen model while training.  [default: its own]")
@click.option("--save-every", type=int, help="Steps between checkpoints.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="INTEGER", help="Of data, order and noise.")
@click.option("-f", "--force", is_flag=True, help="Start over, whatever an interrupted run left.")
@device_option
def train(
    screen: Screen,
    flux: Path,
    data: Path | None,
    preset: str,
    targets: tuple[str, ...],
    device: str | None,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Train the routers of MODEL.flux end to end; the model itself stays frozen.

    Routers, plan and measurements in MODEL.flux are replaced when training is done; the budget stays what it was and
    can be changed by `fluxc calibrate` as before. Interrupted work is resumed by the same command.
    """
    from fluxc.train import api

    options = _options(preset, targets, settings)
    if dry_run:
        return _announce(screen, flux, api.prepare(flux, data=data, options=options, progress=screen.progress()))
    if int(os.environ.get("RANK", "0")):  # torchrun: the first process speaks for all
        screen.quiet, screen.json = True, False
    screen.kept_in, screen.kept_noun = api.work_folder(flux) / api.CHECKPOINTS, "checkpoint"
    done = api.train(
        flux, data=data, options=options, device=chosen_device(device), force=force, progress=screen.progress()
    )
    return _report(screen, done)


def _options(preset: str, targets: tuple[str, ...], settings: dict[str, Any]) -> TrainOptions:
    import fluxc.train.options as library

    changes = {name: value for name, value in settings.items() if value is not None}
    if targets:
        changes["targets"] = {**library.preset(preset).targets, **dict(map(_target, targets))}
    return library.preset(preset, **changes)


def _target(text: str) -> tuple[str, float]:
    task, _, value = text.rpartition("=")
    try:
        return (task, float(value)) if task else _bad_target(text)
    except ValueError:
        return _bad_target(text)


def _bad_target(text: str) -> tuple[str, float]:
    raise OptionError(f"--target {text}", hint="write TASK=Ω, such as --target kv=0.7")


def _announce(screen: Screen, flux: Path, ready: Prepared) -> None:
    options, data = ready.options, ready.data
    screen.show(
        f"would train the routers of {flux} for {options.steps} steps of {options.batch} prompts, "
        f"start {options.start}, tau {options.tau_start:g} to {options.tau_end:g}",
        f"data {data.origin}: {len(data.train)} prompts to train on, {len(data.curve)} for thresholds, "
        f"{len(data.heldout)} held out; padding {ready.padding():.1%}",
        _targets(ready.targets),
    )
    counts = {"train": len(data.train), "curve": len(data.curve), "heldout": len(data.heldout)}
    result = {"dry_run": True, "flux": str(flux), "options": options.to_dict(), "targets": ready.targets}
    screen.result({**result, "prompts": counts, "padding": ready.padding()})


def _targets(targets: dict[str, float]) -> Table:
    made = table("task", "Ω target", numbers=("Ω target",))
    for task, target in targets.items():
        made.add_row(task, f"{target:.2f}")
    return made


def _report(screen: Screen, done: Trained) -> None:
    from fluxc.cli.verified import tasks

    verified, report = done.report["verified"], done.report
    total = verified["routed"]["all"]
    screen.show(
        f"[bold]asked[/]    budget {done.plan.budget:.2f} (Ω {1 - done.plan.budget:.2f})",
        f"[bold]achieved[/] budget {total['full_share']:.2f} (Ω {total['sparse_ratio']:.2f}) on {total['prompts']} "
        f"held-out prompts; padding {report['padding']:.1%}",
        *(f"[bold]warning[/]  {warning}" for warning in report["warnings"]),
        tasks(verified),
        f"trained {done.path} in {report['seconds']:.0f} s; log: {done.path / 'measurements' / 'training.csv'}",
    )
    screen.result({"flux": str(done.path), "plan": done.plan.to_dict(), "report": report})
