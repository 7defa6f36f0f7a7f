"""`fluxc run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.budgets import budget_options
from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.run_report import answer_lines, json_result, times
from fluxc.cli.run_subject import EngineSubject, is_engine, open_engine
from fluxc.cli.screen import Screen
from fluxc.errors import DataError, OptionError

if TYPE_CHECKING:
    from fluxc.engine.engine import Engine
    from fluxc.engine.result import Generation
    from fluxc.runtime.measure import PrefillReport
    from fluxc.runtime.model import FluxModel

_PROMPT_FILE = "name a text file, or - for standard input"
FORCED = {"full": True, "sparse": False}


@command(
    "run",
    examples="""
    fluxc run model.flux --prompt "What is the capital of France?"
    fluxc run model.flux --prompt-file long.txt --budget 0.3
    fluxc run model.flux --prompt-file long.txt --routes sparse --max-new-tokens 8
    cat long.txt | fluxc run model.flux --prompt-file - --no-timing
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option("--prompt", help="The prompt.")
@click.option("--prompt-file", metavar="FILE", help="A file that holds the prompt; - is standard input.")
@click.option("--raw", is_flag=True, help="Give the prompt as it is, not as a user's turn of the chat template.")
@budget_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, help="Above 0, tokens are drawn.  [default: 0]"
)
@click.option("--top-p", type=float, help="Draw from the most likely tokens that make up this share.")
@click.option("--seed", type=click.IntRange(min=0), help="The same seed draws the same tokens.")
@click.option("--routes", type=click.Choice(list(FORCED)), help="Force every routable layer, whatever its router says.")
@click.option("--timing/--no-timing", default=True, help="Time the prefill against dense.  [default: timing]")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Timed runs of each kind.")
@device_option
def run(
    screen: Screen,
    flux: Path,
    prompt: str | None,
    prompt_file: str | None,
    raw: bool,
    budget: float | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    seed: int | None,
    routes: str | None,
    timing: bool,
    repeats: int,
    device: str | None,
) -> None:
    """Answer a prompt with MODEL.flux; show its routes, scores, Ω, KV memory and times, and its prefill against dense.

    An engine directory that `fluxc export` wrote answers as well, without the times of a dense prefill. The answer is
    greedy unless a temperature or --top-p is given.
    """
    text = _prompt(prompt, prompt_file)
    sampling = _sampling(temperature, top_p, seed)
    model = _load(screen, flux, device)
    ids = _token_ids(model, text, raw)
    forced = None if routes is None else [FORCED[routes]] * len(model.plan.layers)
    with _engine(screen, model) as engine:
        options = {"max_new_tokens": max_new_tokens, "budget": budget, "routes": forced, **sampling}
        answer = _answer(screen, engine, ids, **options)
    report = None
    if timing and not isinstance(model, EngineSubject):
        report = _time(screen, model, ids, repeats=repeats, budget=budget, routes=forced)
    screen.show(*answer_lines(model, answer, budget, routes))
    if report:
        screen.show(times(report))
    screen.answer(answer.text)
    screen.result(json_result(model, answer, budget, report))


def _sampling(temperature: float, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """Options of generation; greedy ones where nothing asks for more."""
    drawn = {"temperature": temperature or None, "top_p": top_p}
    given = {name: value for name, value in drawn.items() if value is not None}
    return {**given, "seed": seed} if given else {}


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise OptionError("give the prompt with --prompt or with --prompt-file", hint="one of the two")
    if prompt is not None:
        return prompt
    try:
        with click.open_file(str(prompt_file), encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError as cause:
        raise DataError(f"the prompt file {prompt_file} does not exist", hint=_PROMPT_FILE) from cause
    except OSError as cause:
        raise DataError(f"the prompt file {prompt_file} cannot be read: {cause.strerror}", hint=_PROMPT_FILE) from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"the prompt file {prompt_file} is not UTF-8 text", hint="save it as UTF-8") from cause


def _load(screen: Screen, flux: Path, device: str | None) -> FluxModel | EngineSubject:
    screen.progress().start("checking and loading the model")
    if is_engine(flux):
        return open_engine(flux, device)
    from fluxc.runtime.model import load_flux

    return load_flux(flux, chosen_device(device))


def _engine(screen: Screen, model: FluxModel | EngineSubject) -> Engine:
    if isinstance(model, EngineSubject):
        return model.engine
    from fluxc.engine.load import engine_of

    screen.progress().start("preparing prefill and decode")
    engine = engine_of(model, max_batch=1)
    engine.warm_up()
    return engine


def _token_ids(model: FluxModel | EngineSubject, text: str, raw: bool) -> list[int]:
    from fluxc.data.tokenizing import has_chat_template
    from fluxc.engine.text import prompt_ids

    chat = not raw and has_chat_template(model.tokenizer)
    return prompt_ids(model.tokenizer, [{"role": "user", "content": text}] if chat else text)


def _answer(screen: Screen, engine: Engine, ids: list[int], **options: Any) -> Generation:
    progress = screen.progress()
    progress.start("answering", options["max_new_tokens"])
    return engine.generate(ids, stream=lambda piece: progress.advance(), **options)


def _time(screen: Screen, model: FluxModel, ids: list[int], **options: Any) -> PrefillReport:
    from fluxc.runtime.measure import measure_prefill

    return measure_prefill(model, ids, guard=True, progress=screen.progress(), **options)
