"""`fluxc run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.budgets import budget_options
from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.screen import Screen
from fluxc.cli.strip import coloured, legend, strip
from fluxc.cli.tables import size, table
from fluxc.errors import DataError, OptionError

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.runtime.generate import Generation
    from fluxc.runtime.measure import PrefillReport
    from fluxc.runtime.model import FluxModel

SCORES_A_LINE = 10
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
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
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
    routes: str | None,
    timing: bool,
    repeats: int,
    device: str | None,
) -> None:
    """Answer a prompt with MODEL.flux; show its routes, scores, Ω and prefill time against dense.

    The answer is greedy. There is no KV cache yet: each new token recomputes the whole text, so keep answers short.
    """
    text = _prompt(prompt, prompt_file)
    model = _load(screen, flux, device)
    ids = _token_ids(model, text, raw)
    forced = None if routes is None else [FORCED[routes]] * len(model.plan.layers)
    answer = _answer(screen, model, ids, max_new_tokens=max_new_tokens, budget=budget, routes=forced)
    report = _time(screen, model, ids, repeats=repeats, budget=budget, routes=forced) if timing else None
    screen.show(*_routing(model, answer, budget, routes))
    if report:
        screen.show(times(report))
    screen.answer(answer.text)
    screen.result(_result(model, answer, budget, report))


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


def _load(screen: Screen, flux: Path, device: str | None) -> FluxModel:
    from fluxc.runtime.model import load_flux

    screen.progress().start("checking and loading the model")
    return load_flux(flux, chosen_device(device))


def _token_ids(model: FluxModel, text: str, raw: bool) -> list[int]:
    from fluxc.data.tokenizing import has_chat_template
    from fluxc.runtime.generate import prompt_ids

    chat = not raw and has_chat_template(model.tokenizer)
    return prompt_ids(model, [{"role": "user", "content": text}] if chat else text)


def _answer(screen: Screen, model: FluxModel, ids: list[int], **options: Any) -> Generation:
    progress = screen.progress()
    progress.start("answering", options["max_new_tokens"])
    return model.generate(ids, stream=lambda piece: progress.advance(), **options)


def _time(screen: Screen, model: FluxModel, ids: list[int], **options: Any) -> PrefillReport:
    from fluxc.runtime.measure import measure_prefill

    return measure_prefill(model, ids, guard=True, progress=screen.progress(), **options)


def _routing(model: FluxModel, answer: Generation, budget: float | None, forced: str | None) -> list[str]:
    layers = [layer.layer for layer in model.plan.layers]
    routes = dict(zip(layers, (bool(route) for route in answer.routes), strict=True))
    line = strip(routes, [attention.layer for attention in model.plan.model.attentions])
    wanted = model.plan.budget if budget is None else budget
    asked = f"all {forced} as asked" if forced else f"asked {1 - wanted:.2f} on average, budget {wanted:g}"
    lines = [
        f"[bold]routes[/] {coloured(line)}   {legend(line)}",
        f"[bold]Ω[/]      {answer.sparse_ratio:.2f} ({asked}); {answer.prompt_tokens} tokens in the prompt",
        *_scores(layers, answer, model, budget),
    ]
    full = model.plan.kv_bytes([True] * len(layers), answer.prompt_tokens + len(answer.tokens))
    return [*lines, f"[bold]KV[/]     {size(answer.kv_bytes)} planned, {size(full)} if every layer were full"]


def _scores(layers: list[int], answer: Generation, model: FluxModel, budget: float | None) -> list[str]:
    if answer.scores is None:
        return [f"[bold]scores[/] none: below the crossover of {model.crossover(budget)} tokens the dense program runs"]
    cells = [f"{layer}:{score:+.2f}" for layer, score in zip(layers, answer.scores.tolist(), strict=True)]
    rows = ["  ".join(cells[at : at + SCORES_A_LINE]) for at in range(0, len(cells), SCORES_A_LINE)]
    return ["[bold]scores[/] " + rows[0], *("       " + row for row in rows[1:])]


def times(report: PrefillReport) -> Table:
    """Prefill times of one length, each beside its bound and its ideal."""
    head = ("prefill", "Ω", "seconds", "speed-up", "ideal", "bound")
    made = table(*head, numbers=head[1:])
    made.add_row(f"dense, {report.length} tokens", "0.00", f"{report.dense.median:.3f}", "1.00", "", "")
    names = {"forced": "routes forced", "chosen": "routes chosen by the routers"}
    for row in report.routed:
        figures = (row.seconds.median, row.speedup, row.ideal, row.bound)
        seconds, *factors = figures
        made.add_row(
            names[row.name], f"{row.sparse_ratio:.2f}", f"{seconds:.3f}", *(f"{value:.2f}" for value in factors)
        )
    return made


def _result(model: FluxModel, answer: Generation, budget: float | None, report: PrefillReport | None) -> dict[str, Any]:
    layers = [layer.layer for layer in model.plan.layers]
    scores = [None] * len(layers) if answer.scores is None else answer.scores.tolist()
    return {
        "answer": answer.text,
        "finish": answer.finish,
        "tokens": list(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "budget": model.plan.budget if budget is None else budget,
        "sparse_ratio": answer.sparse_ratio,
        "crossover": model.crossover(budget),
        "layers": [
            {"layer": layer, "full": bool(route), "score": score}
            for layer, route, score in zip(layers, answer.routes, scores, strict=True)
        ],
        "kv_bytes": answer.kv_bytes,
        "prefill_seconds": answer.prefill_seconds,
        "decode_seconds": answer.decode_seconds,
        "timing": report.to_dict() if report else None,
    }
