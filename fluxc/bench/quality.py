"""`python -m fluxc.bench.quality model.flux`: what routing costs on held-out prompts, beside its controls.

Four suites on texts, wordings and seeds that calibration never saw: needle, text, local, mixed. Every system runs the
same program; only `route_bias` differs. Results go to a JSON file with one row a prompt and system.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import torch

from fluxc.artifact import versions
from fluxc.atomic import atomic_file
from fluxc.bench.kept_rows import KeptRows
from fluxc.bench.nestedness import nestedness, nestedness_table
from fluxc.bench.static import calibration_prompts
from fluxc.bench.summary import tables
from fluxc.bench.systems import System, controls, first_order_ranking, leave_one_out_ranking, plan_name, top_layers
from fluxc.calibrate.runner import Outcome, run_biases
from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.screen import Screen
from fluxc.data import HELDOUT, LOCAL, TASKS, TEXT, TokenizedPrompt, corpus, generate
from fluxc.errors import DataError
from fluxc.runtime.model import FluxModel, load_flux

SEED = 1000
TOGETHER = 8
"""Systems that run as one batch on a GPU."""
BUDGETS = (0.2, 0.27, 0.3, 0.4, 0.6)


@dataclasses.dataclass(frozen=True)
class Suite:
    """Held-out prompts of some tasks; `count` in all, lengths in tokens taking turns."""

    tasks: tuple[str, ...]
    count: int
    lengths: tuple[int, ...]


SUITES = {
    "needle": Suite(("needle",), 96, (2500, 4000)),
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


def check_suites(names: Sequence[str], context: int) -> None:
    """Raise DataError for a suite with prompts longer than the model's context (0: not known)."""
    for name in names:
        longest = max(SUITES[name].lengths)
        if 0 < context < longest:
            raise DataError(
                f"the suite {name} has prompts of {longest} tokens, and the context is {context}",
                hint="choose other suites with --suite",
            )


def systems_of(model: FluxModel, budgets: Sequence[float], ranking: dict[str, torch.Tensor]) -> list[System]:
    """Controls, the plan at each budget, and the static choices at the same number of full layers."""
    layers = len(model.plan.layers)
    systems = controls(layers)
    for budget in budgets:
        systems.append(System(plan_name(budget), torch.tensor(model.plan.bias(budget)), budget))
        for name, ranks in ranking.items():
            systems.append(System(f"static {name} {budget:g}", top_layers(ranks, math.ceil(budget * layers)), budget))
    return systems


def chosen(systems: Sequence[System], only: Sequence[str]) -> list[System]:
    """Dense and the systems that match one of `only`; all of them where it names none."""
    unknown = [name for name in only if not any(fnmatch(system.name, name) for system in systems)]
    if unknown:
        names = ", ".join(system.name for system in systems)
        raise DataError(f"no system is called {unknown[0]}", hint=f"these are: {names}")
    return [s for s in systems if not only or s.name == "dense" or any(fnmatch(s.name, name) for name in only)]


def run_suite(
    model: FluxModel,
    suite: str,
    prompts: Sequence[TokenizedPrompt],
    systems: Sequence[System],
    kept: KeptRows,
    bar: Any,
) -> list[dict[str, Any]]:
    """One row a prompt and system: loss in nats, exact match, full share, routes as a string."""
    rows = []
    for index, prompt in enumerate(prompts):
        missing = [system for system in systems if kept.get(suite, index, system.name) is None]
        bar(len(systems) - len(missing))
        for system, outcome in zip(missing, _outcomes(model, prompt, missing), strict=True):
            kept.add([_row(suite, index, prompt, system, outcome)])
            bar()
        rows += [kept.get(suite, index, system.name) or {} for system in systems]
    return rows


def _row(suite: str, index: int, prompt: TokenizedPrompt, system: System, outcome: Outcome) -> dict[str, Any]:
    routes = "".join("1" if full else "0" for full in outcome.routes)
    row = {"suite": suite, "prompt": index, "task": prompt.task, "tokens": len(prompt), "system": system.name}
    return row | {"loss": outcome.loss, "exact": outcome.exact if prompt.asks else None, "routes": routes}


def _outcomes(model: FluxModel, prompt: TokenizedPrompt, systems: Sequence[System]) -> Iterator[Outcome]:
    """The systems on one prompt; a GPU takes several as one batch, which costs it hardly more than one."""
    together = TOGETHER if model.device.startswith("cuda") else 1
    for start in range(0, len(systems), together):
        biases = torch.stack([system.bias for system in systems[start : start + together]], dim=1)
        yield from run_biases(model.routed, prompt, biases.to(model.device))


def rankings(model: FluxModel, left_out: int, bar: Any) -> dict[str, torch.Tensor]:
    """Static rankings of the layers: by first order, and by leave-one-out on `left_out` calibration prompts."""
    found = {"first-order": first_order_ranking(model.flux)}
    if left_out:
        prompts = calibration_prompts(model)[:left_out]
        layers = len(model.plan.layers)
        found["leave-one-out"] = leave_one_out_ranking(model.routed_program, prompts, layers, model.device, bar)
    return found


@command(
    "quality",
    examples="""
    python -m fluxc.bench.quality smollm2.flux
    python -m fluxc.bench.quality smollm2.flux --suite needle --budget 0.4 --share 0.25
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option("--suite", "suites", multiple=True, type=click.Choice(sorted(SUITES)), help="Default: all four.")
@click.option("--budget", "budgets", multiple=True, type=click.FloatRange(0, 1), help=f"Default: {BUDGETS}.")
@click.option("--share", default=1.0, type=click.FloatRange(0, 1, min_open=True), help="Share of each suite's prompts.")
@click.option(
    "--system", "only", multiple=True, help="Only these systems, and dense; `static*` takes all of that name."
)
@click.option("--leave-one-out", "left_out", default=0, show_default=True, help="Calibration prompts to rank by.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write all rows there, as JSON.")
@device_option
def quality(
    screen: Screen,
    flux: Path,
    suites: tuple[str, ...],
    budgets: tuple[float, ...],
    share: float,
    only: tuple[str, ...],
    left_out: int,
    output: Path | None,
    device: str | None,
) -> None:
    """Compare MODEL.flux with its controls on held-out prompts.

    With `-o`, an interrupted run goes on where it stopped.
    """
    model, progress = load_flux(flux, chosen_device(device)), screen.progress()
    names = suites or tuple(SUITES)
    check_suites(names, model.plan.model.context)
    progress.start("ranking layers", left_out * len(model.plan.layers) or None)
    ranking = rankings(model, left_out, progress.advance)
    budgets = budgets or BUDGETS
    systems = chosen(systems_of(model, budgets, ranking), only)
    kept = KeptRows(output and output.with_name(output.name + ".rows"), conditions(model))
    ranks = {name: values.tolist() for name, values in ranking.items()}
    result: dict[str, Any] = {"conditions": conditions(model), "rankings": ranks, "suites": {}, "nestedness": {}}
    for name in names:
        prompts = prompts_of(SUITES[name], model, share)
        progress.start(name, len(prompts) * len(systems))
        rows = run_suite(model, name, prompts, systems, kept, progress.advance)
        result["suites"][name], result["nestedness"][name] = rows, nestedness(rows, budgets)
        if output:  # after every suite: what is done is kept
            _write(output, result)
    kept.remove()
    screen.show(*tables(result["suites"]), nestedness_table(result["nestedness"]))
    screen.result(result)


def _write(path: Path, result: dict[str, Any]) -> None:
    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(result))


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
    sys.exit(run_frame(command=quality, name="python -m fluxc.bench.quality"))
