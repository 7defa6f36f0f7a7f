"""What a calibration achieved on held-out prompts, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluxc.cli.tables import size, table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from fluxc.plan import Plan

STATIC_BELOW = 0.25
"""Share of input-dependent layers below which a routing is called static."""


def verified_lines(plan: Plan, report: dict[str, Any]) -> list[RenderableType]:
    """Budget asked and achieved, the held-out table, the kinds that were compared, and KV bytes."""
    verified = report["verified"]
    total = verified["routed"]["all"]
    lines: list[RenderableType] = [
        f"[bold]asked[/]    budget {plan.budget:.2f} (Ω {1 - plan.budget:.2f})",
        f"[bold]achieved[/] budget {total['full_share']:.2f} (Ω {total['sparse_ratio']:.2f}) on {total['prompts']} "
        f"held-out prompts; {_dependence(verified['input_dependent'])}",
        _kinds(plan, report["kinds"]),
        *_full_kind(report.get("full_kind")),
        _memory(plan, total["full_share"]),
    ]
    if report.get("rank_correlation") is not None:
        lines.append(f"[bold]ranking[/]  {report['rank_correlation']:.2f} rank correlation with leave-one-out")
    return [*lines, tasks(verified)]


def tasks(verified: dict[str, Any]) -> Table:
    """One row a task: full share, exact match and perplexity, dense and routed."""
    head = ("task", "prompts", "full share", "exact dense", "exact fluxc", "ppl dense", "ppl fluxc")
    made = table(*head, numbers=head[1:])
    for name in sorted(verified["routed"], key=lambda name: (name == "all", name)):
        dense, routed = verified["dense"][name], verified["routed"][name]
        exact = [_share(dense["exact"]), _share(routed["exact"])]
        perplexity = [f"{dense['perplexity']:.2f}", f"{routed['perplexity']:.2f}"]
        made.add_row(name, str(routed["prompts"]), f"{routed['full_share']:.2f}", *exact, *perplexity)
    return made


def _dependence(share: float) -> str:
    words = f"{share:.0%} of the layers depend on the prompt"
    return f"{words}: static" if share < STATIC_BELOW else words


def _kinds(plan: Plan, kinds: list[dict[str, Any]]) -> str:
    chosen = plan.layers[0]
    sizes = f"sink {chosen.sink}, window {chosen.window}"
    if chosen.kind == "block":
        sizes = f"blocks of {chosen.block} holding {chosen.threshold:g} of the weight"
    line = f"[bold]kind[/]     {chosen.kind}, {sizes}, decode {plan.decode}"
    if chosen.full_kind == "block":
        line += f"; full layers read blocks of {chosen.block} holding {chosen.threshold:g} of the weight"
    if len(kinds) < 2:
        return line
    compared = (f"{k['kind']} loss {k['loss']:.3f} with {k['kv_slots']} KV slots" for k in kinds)
    return f"{line} (at equal prefill time: {'; '.join(compared)})"


def _full_kind(found: dict[str, Any] | None) -> list[RenderableType]:
    """What block attention in all full layers lost, where it was asked for."""
    if not found:
        return []
    exact = "" if found["exact"] is None else f", exact {found['dense_exact']:.2f} to {found['exact']:.2f}"
    rise = f"{found['rise']:+.2%} perplexity of answers{exact} on {found['prompts']} held-out prompts"
    verdict = (
        "kept" if found["kept"] else f"[bold]not kept[/]: more than {found['allowed']:.1%}; full layers stay dense"
    )
    return [f"[bold]full[/]     by blocks: {rise}; {verdict}"]


def _memory(plan: Plan, full_share: float) -> str:
    context = plan.model.context
    full, sparse = (plan.kv_bytes([flag] * len(plan.layers), context) for flag in (True, False))
    mean = round(sparse + full_share * (full - sparse))
    return f"[bold]KV[/]       {size(mean)} a request of {context} tokens on average, {size(full)} dense"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
