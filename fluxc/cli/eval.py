"""`fluxc eval`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.screen import Screen
from fluxc.errors import OptionError

if TYPE_CHECKING:
    from fluxc.evaluate.evaluation import Evaluation
    from fluxc.evaluate.options import EvalOptions
    from fluxc.evaluate.store import Store

RATIO = click.FloatRange(0, 1)


@command(
    "eval",
    makes=True,
    examples="""
    fluxc eval model.flux
    fluxc eval model.flux --suite retrieval,text --budget 0.2 --budget 0.4 --csv rows.csv
    fluxc eval model.flux --data mine.jsonl
    fluxc eval path/to/model-folder --suite needle --length 4000
    """,
)
@click.argument("model", metavar="MODEL")
@click.option(
    "--suite",
    "suites",
    multiple=True,
    metavar="NAMES",
    help="retrieval, needle, text, local, reasoning, long-answer; commas between. Default: retrieval,text,local.",
)
@click.option("--budget", "budgets", multiple=True, type=RATIO, help="Again for more.  [default: the plan's]")
@click.option("--sparse-ratio", "ratios", multiple=True, type=RATIO, metavar="Ω", help="The same, said as 1 - budget.")
@click.option("--count", type=click.IntRange(1), help="Prompts of each suite.  [default: 24]")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(1), help="Tokens of a prompt; again for more.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the prompts and of random routes.  [default: 1000]")
@click.option("--oracle", type=click.Choice(["ranking", "greedy"]), help="Also choose layers with the answer at hand.")
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="Your prompts, as JSONL.")
@click.option("--corpus", type=click.Path(path_type=Path), metavar="DIR", help="Your texts for haystacks and prose.")
@click.option("--together", type=click.IntRange(1), help="Routings of one prompt run as one batch.")
@click.option(
    "--part",
    metavar="I/N",
    help="One of N processes that share the work; their samples stay.",
)
@click.option("--csv", "table", type=click.Path(path_type=Path), metavar="FILE", help="Also write the rows as CSV.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: NAME.eval.json beside the model]")
@device_option
def eval(
    screen: Screen,
    model: str,
    suites: tuple[str, ...],
    corpus: Path | None,
    data: Path | None,
    table: Path | None,
    output: Path | None,
    device: str | None,
    force: bool,
    dry_run: bool,
    **asked: Any,
) -> None:
    """Evaluate MODEL on suites of prompts, beside dense, all-sparse, every second layer, the best static choice of
    layers and random ones at equal Ω.

    MODEL is a model.flux folder, an engine folder, or any model (which then runs dense alone). All systems are the
    same program under other routes. Every sample is kept as it comes: a run that is interrupted goes on where it
    stopped, and one that replaces a result takes its samples over.
    """
    from fluxc.cli.outputs import check_file
    from fluxc.data import corpus as packaged
    from fluxc.data.folder import FolderTexts
    from fluxc.evaluate import results
    from fluxc.evaluate.evaluation import Evaluation
    from fluxc.evaluate.store import Store
    from fluxc.evaluate.subjects import open_subject

    options = _options(suites, data, asked)
    target = check_file(output or results.default_output(model), force)
    texts = FolderTexts(corpus) if corpus else packaged
    subject = open_subject(model, chosen_device(device), screen.progress())
    folder = results.samples_folder(target)
    store = Store(None if dry_run else folder, subject.digest, results.known_samples(target))
    made = Evaluation(subject, options, store, texts=texts, data=data, progress=screen.progress())
    if dry_run:
        screen.show(f"would run {made.passes()} forward passes and write {target}")
        return screen.result({"passes": made.passes(), "output": str(target), "dry_run": True})
    screen.kept_in, screen.kept_noun = folder, "sample"
    return _run(screen, made, target, table, store)


def _run(screen: Screen, made: Evaluation, target: Path, table: Path | None, store: Store) -> None:
    from fluxc.cli.eval_tables import suite_tables
    from fluxc.evaluate import results

    result = made.run()
    results.write(target, result)
    if table:
        table.write_text(results.as_csv(result["rows"]), encoding="utf-8")
    # Another process may still read the samples they share.
    if store.folder and made.options.part == (1, 1):
        shutil.rmtree(store.folder, ignore_errors=True)
    screen.show(*suite_tables(result), f"rows and intervals: {target}; `fluxc report` draws them")
    screen.result({"output": str(target), **{name: result[name] for name in ("conditions", "suites", "summary")}})


def _options(suites: tuple[str, ...], data: Path | None, asked: dict[str, Any]) -> EvalOptions:
    from fluxc.evaluate.options import EvalOptions
    from fluxc.evaluate.suites import DEFAULT, USER

    named = tuple(name for names in suites for name in names.split(",") if name) or (() if data else DEFAULT)
    budgets = [*asked.pop("budgets"), *(round(1 - ratio, 9) for ratio in asked.pop("ratios"))]
    part = asked.pop("part")
    given = {name: value for name, value in asked.items() if value}
    return EvalOptions(
        suites=tuple(dict.fromkeys((*named, *((USER,) if data else ())))),
        budgets=tuple(sorted(set(budgets))),
        part=_part(part) if part else (1, 1),
        **given,
    )


def _part(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    if not (first.isdigit() and second.isdigit()):
        raise OptionError(f"--part {text} is not two numbers", hint="the parts of 2 are 1/2 and 2/2")
    return int(first), int(second)
