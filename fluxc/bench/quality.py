"""`python -m fluxc.bench.quality model.flux`: what routing costs on held-out prompts, beside its controls.

Four suites on texts, wordings and seeds that calibration never saw: needle, text, local, mixed. Every system runs the
same program; only `route_bias` differs. Results go to a JSON file with one row a prompt and system.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress as Bar

from fluxc.artifact import versions
from fluxc.atomic import atomic_file
from fluxc.bench.summary import tables
from fluxc.bench.systems import System, controls, first_order_ranking, leave_one_out_ranking, top_layers
from fluxc.calibrate.options import CalibrateOptions
from fluxc.calibrate.prompts import generated_prompts
from fluxc.calibrate.runner import run_prompt
from fluxc.data import HELDOUT, LOCAL, TASKS, TEXT, TokenizedPrompt, corpus, generate
from fluxc.errors import OptionError
from fluxc.runtime.model import FluxModel, load_flux

SEED = 1000


@dataclasses.dataclass(frozen=True)
class Suite:
    """Held-out prompts of some tasks; `count` in all, lengths in tokens taking turns."""

    tasks: tuple[str, ...]
    count: int
    lengths: tuple[int, ...]


SUITES = {
    "needle": Suite(("needle",), 48, (2500, 4000)),
    "text": Suite(TEXT, 48, (6000,)),
    "local": Suite(LOCAL, 24, (2500, 4000)),
    "mixed": Suite(TASKS, 72, (2400, 3200, 4000)),
}


def prompts_of(suite: Suite, model: FluxModel, share: float = 1.0) -> list[TokenizedPrompt]:
    """The suite's prompts for this model's tokenizer, sink and window; `share` of them, whole rounds of tasks."""
    layer = model.plan.layers[0]
    rounds = max(1, round(suite.count * share / len(suite.tasks)))
    count = rounds * len(suite.tasks)
    return generate(suite.tasks, count, model.tokenizer, suite.lengths, SEED, HELDOUT, layer.sink, layer.window)


def systems_of(model: FluxModel, budgets: Sequence[float], ranking: dict[str, torch.Tensor]) -> list[System]:
    """Controls, the plan at each budget, and the static choices at the same number of full layers."""
    layers = len(model.plan.layers)
    systems = controls(layers)
    for budget in budgets:
        systems.append(System(f"fluxc {budget:g}", torch.tensor(model.plan.bias(budget)), budget))
        for name, ranks in ranking.items():
            systems.append(System(f"static {name} {budget:g}", top_layers(ranks, math.ceil(budget * layers)), budget))
    return systems


def run_suite(
    model: FluxModel, prompts: Sequence[TokenizedPrompt], systems: Sequence[System], bar: Any
) -> list[dict[str, Any]]:
    """One row a prompt and system: loss in nats, exact match, full share, routes as a string."""
    rows = []
    for index, prompt in enumerate(prompts):
        for system in systems:
            outcome = run_prompt(model.routed, prompt, system.bias.to(model.device))
            routes = "".join("1" if full else "0" for full in outcome.routes)
            row = {"prompt": index, "task": prompt.task, "tokens": len(prompt), "system": system.name}
            rows.append(row | {"loss": outcome.loss, "exact": outcome.exact if prompt.asks else None, "routes": routes})
            bar()
    return rows


def rankings(model: FluxModel, left_out: int, bar: Any) -> dict[str, torch.Tensor]:
    """Static rankings of the layers: by first order, and by leave-one-out on `left_out` calibration prompts."""
    found = {"first-order": first_order_ranking(model.flux)}
    if left_out:
        origin = model.plan.calibration
        layer = model.plan.layers[0]
        options = CalibrateOptions(seed=origin["seed"], effort=origin["effort"], sink=layer.sink, window=layer.window)
        prompts = generated_prompts(options, model.tokenizer, model.plan.model.context).measured[:left_out]
        layers = len(model.plan.layers)
        found["leave-one-out"] = leave_one_out_ranking(model.routed_program, prompts, layers, model.device, bar)
    return found


@click.command(help=__doc__)
@click.argument("flux", type=click.Path(exists=True))
@click.option("--suite", "suites", multiple=True, type=click.Choice(sorted(SUITES)), help="Default: all four.")
@click.option("--budget", "budgets", multiple=True, type=float, help="Default: 0.2 0.27 0.3 0.4 0.6.")
@click.option("--share", default=1.0, show_default=True, help="Share of each suite's prompts.")
@click.option("--leave-one-out", "left_out", default=0, show_default=True, help="Calibration prompts to rank by.")
@click.option("--device", default="cpu", show_default=True)
@click.option("-o", "--output", default="quality.json", show_default=True)
def main(
    flux: str,
    suites: tuple[str, ...],
    budgets: tuple[float, ...],
    share: float,
    left_out: int,
    device: str,
    output: str,
) -> None:
    """Run the suites and write the JSON."""
    if not 0 < share <= 1:
        raise OptionError(f"share {share:g} is outside 0..1")
    model = load_flux(flux, device=device)
    console = Console(stderr=True)
    result: dict[str, Any] = {"suites": {}, "conditions": conditions(model)}
    with Bar(console=console) as bar:
        layers = len(model.plan.layers)
        task = bar.add_task("ranking layers", total=left_out * layers or 1)
        ranking = rankings(model, left_out, lambda: bar.advance(task))
        systems = systems_of(model, budgets or (0.2, 0.27, 0.3, 0.4, 0.6), ranking)
        result["rankings"] = {name: ranks.tolist() for name, ranks in ranking.items()}
        for name in suites or SUITES:
            prompts = prompts_of(SUITES[name], model, share)
            task = bar.add_task(name, total=len(prompts) * len(systems))
            result["suites"][name] = run_suite(model, prompts, systems, lambda task=task: bar.advance(task))
    with atomic_file(Path(output), force=True) as temporary:
        temporary.write_text(json.dumps(result))
    for table in tables(result["suites"]):
        Console().print(table)


def conditions(model: FluxModel) -> dict[str, Any]:
    """What the numbers depend on."""
    layer = model.plan.layers[0]
    name = (
        torch.cuda.get_device_name() if model.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )
    return {
        "model": Path(model.meta.get("source", "")).name,
        "dtype": model.plan.model.dtype,
        "device": name,
        "plan": model.plan.digest(),
        "kind": layer.kind,
        "sink": layer.sink,
        "window": layer.window,
        "decode": model.plan.decode,
        "seed": SEED,
        "corpus": corpus.hash(),
        "calibration": model.plan.calibration,
        "versions": versions(),
    }


if __name__ == "__main__":
    main()
