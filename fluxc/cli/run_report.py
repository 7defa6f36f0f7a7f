"""What `fluxc run` shows of an answer: routes, scores, memory, times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxc.cli.strip import coloured, legend, strip
from fluxc.cli.tables import size, table

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.cli.run_subject import EngineSubject
    from fluxc.engine.result import Generation
    from fluxc.runtime.measure import PrefillReport
    from fluxc.runtime.model import FluxModel

SCORES_A_LINE = 10


def answer_lines(
    model: FluxModel | EngineSubject, answer: Generation, budget: float | None, forced: str | None
) -> list[str]:
    """Lines for people; `forced` is "full" or "sparse" where every layer was."""
    routes = dict(zip(_layers(model), _flags(answer), strict=True))
    line = strip(routes, [attention.layer for attention in model.plan.model.attentions])
    wanted = model.plan.budget if budget is None else budget
    asked = f"all {forced} as asked" if forced else f"asked {1 - wanted:.2f} on average, budget {wanted:g}"
    return [
        f"[bold]routes[/] {coloured(line)}   {legend(line)}",
        f"[bold]Ω[/]      {answer.sparse_ratio:.2f} ({asked}); {answer.prompt_tokens} tokens in the prompt",
        *_scores(model, answer, budget),
        _memory(model, answer),
        _seconds(answer),
    ]


def _layers(model: FluxModel | EngineSubject) -> list[int]:
    return [layer.layer for layer in model.plan.layers]


def _flags(answer: Generation) -> list[bool]:
    return [] if answer.routes is None else [bool(route) for route in answer.routes]


def _scores(model: FluxModel | EngineSubject, answer: Generation, budget: float | None) -> list[str]:
    if answer.scores is None:
        return [f"[bold]scores[/] none: {_why_dense(model, answer, budget)} the dense program runs"]
    cells = [f"{layer}:{score:+.2f}" for layer, score in zip(_layers(model), answer.scores.tolist(), strict=True)]
    rows = ["  ".join(cells[at : at + SCORES_A_LINE]) for at in range(0, len(cells), SCORES_A_LINE)]
    return ["[bold]scores[/] " + rows[0], *("       " + row for row in rows[1:])]


def _why_dense(model: FluxModel | EngineSubject, answer: Generation, budget: float | None) -> str:
    crossover = model.crossover(budget)
    short = answer.prompt_tokens < crossover
    return f"below the crossover of {crossover} tokens" if short else "where every layer is full anyway,"


def _memory(model: FluxModel | EngineSubject, answer: Generation) -> str:
    cached = answer.prompt_tokens + len(answer.tokens) - 1
    full = model.plan.kv_bytes([True] * len(model.plan.layers), cached)
    kept = answer.kv_bytes
    return (
        f"[bold]KV[/]     {size(kept.measured)} in pages, {size(kept.planned)} planned, "
        f"{size(full)} if every layer were full; at most {size(kept.peak)} at a time"
    )


def _seconds(answer: Generation) -> str:
    spent = answer.timings
    first = f"[bold]time[/]   {spent.first_token:.2f} s to the first token"
    if not spent.per_token:
        return first
    each = spent.decode / len(spent.per_token)
    return f"{first}, {1000 * each:.0f} ms for each further one"


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


def json_result(
    model: FluxModel | EngineSubject, answer: Generation, budget: float | None, report: PrefillReport | None
) -> dict[str, Any]:
    """The whole result, JSON-ready."""
    layers, spent = _layers(model), answer.timings
    scores = [None] * len(layers) if answer.scores is None else answer.scores.tolist()
    return {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": list(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "budget": model.plan.budget if budget is None else budget,
        "sparse_ratio": answer.sparse_ratio,
        "crossover": model.crossover(budget),
        "layers": [
            {"layer": layer, "full": full, "score": score}
            for layer, full, score in zip(layers, _flags(answer), scores, strict=True)
        ],
        "kv_bytes": {
            "planned": answer.kv_bytes.planned,
            "measured": answer.kv_bytes.measured,
            "peak": answer.kv_bytes.peak,
        },
        "first_token_seconds": spent.first_token,
        "token_seconds": list(spent.per_token),
        "timing": report.to_dict() if report else None,
    }
