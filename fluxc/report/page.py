"""The report as one HTML page: no script, no network, light and dark, desktop and phone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from fluxc.cli.tables import size
from fluxc.report.figures import accuracy_figures, cost_figures, route_figures
from fluxc.report.findings import Tile, entries_of, in_words, shown_budget, tiles
from fluxc.report.material import Material
from fluxc.report.reproduce import commands, facts
from fluxc.report.scene import Figure
from fluxc.report.svg import inline
from fluxc.report.theme import style_sheet


def page(material: Material) -> str:
    """The whole document."""
    title = escape(f"{material.name}, routed by fluxc")
    sections = "".join((_accuracy(material), _routes(material), _cost(material), _plan(material), _reproduce(material)))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{style_sheet()}</style></head>'
        f"<body><main>{_head(material)}{sections}{_foot(material)}</main></body></html>\n"
    )


def _head(material: Material) -> str:
    plan = material.plan
    layer = plan.layers[0]
    lead = (
        f"For each prompt, each of {len(plan.layers)} attention layers decides between full and sparse attention. "
        f"The weights are as they were; the routers keep to a budget of {plan.budget:g}, and a sparse layer reads "
        f"{layer.keys:,} keys at most."
    )
    if layer.kind == "block":
        lead = lead.rsplit(",", 1)[0] + "."
    shown = "".join(_tile(tile) for tile in tiles(material))
    return (
        f'<header><p class="kicker">fluxc report</p><h1>{escape(material.name)}</h1>'
        f'<p class="lead">{escape(lead)}</p><div class="tiles">{shown}</div></header>'
    )


def _tile(tile: Tile) -> str:
    return f'<div class="tile"><b>{escape(tile.value)}</b><span>{escape(tile.meaning)}</span></div>'


def _accuracy(material: Material) -> str:
    evaluation = material.evaluation
    if evaluation is None:
        return _missing("Accuracy against Ω", f"fluxc eval {material.path.name}")
    said = (
        "All systems are the same program under other routes. Points further right run more layers on sparse "
        "attention; lines join budgets; bars and the band are 95 % intervals."
    )
    details = "".join(_table(evaluation, suite) for suite in evaluation["suites"])
    rest = f"<details><summary>All numbers</summary>{details}</details>" if details else ""
    body = _other_plan(evaluation, material.plan.digest()) + _grid(accuracy_figures(material))
    return _section("Accuracy against Ω", said, body + rest + _long(evaluation))


def _other_plan(evaluation: dict[str, Any], digest: str) -> str:
    """A warning where the numbers belong to another plan than the one the page is about."""
    known = evaluation["conditions"].get("plan", digest)
    said = f"Evaluated under the plan {known[:12]}, not this folder's {digest[:12]}: another budget or calibration."
    return "" if known == digest else f'<p class="sub warn">{escape(said)}</p>'


def _long(evaluation: dict[str, Any]) -> str:
    """Long answers by system and decode setting."""
    rows = [row for row in evaluation["rows"] if "agree" in row]
    if not rows:
        return ""
    head = ("long answers", "decode", "agrees with dense", "perplexity under dense", "fresh 4-grams", "KV")
    body = []
    for system, decode in dict.fromkeys((row["system"], row["decode"]) for row in rows):
        found = [row for row in rows if (row["system"], row["decode"]) == (system, decode)]
        means = [sum(row[key] for row in found) / len(found) for key in ("agree", "loss", "fresh", "kv_bytes")]
        agree, loss, fresh, held = means
        cells = (system, decode, f"{agree:.2f}", f"{math.exp(loss):.2f}", f"{fresh:.2f}", size(int(held)))
        body.append(_cells(cells, system.startswith("fluxc")))
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    table = f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="card hint"><div class="scroll">{table}</div></div>'


def _routes(material: Material) -> str:
    said = "Routing is decided once a prompt, before the first token: columns are layers, and the figures line up."
    figures = route_figures(material)
    return _section("Which layers run full", said, _grid(figures)) if figures else ""


def _cost(material: Material) -> str:
    said = "What routing gives on this machine, and what it could give at most."
    figures = _grid(cost_figures(material))
    hint = "" if material.bench else _hint("Prefill times are not stored", f"fluxc bench {material.path.name}")
    return _section("Time and memory", said, figures + hint)


def _plan(material: Material) -> str:
    sentences = "".join(f"<p>{escape(text)}</p>" for text in in_words(material) if text)
    return _section("The plan in words", "", f'<div class="card">{sentences}</div>')


def _reproduce(material: Material) -> str:
    shell = "\n".join(commands(material))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts(material))
    body = f'<pre>{escape(shell)}</pre><div class="card"><dl>{rows}</dl></div>'
    return _section("How to reproduce", "The same seed gives the same prompts and the same numbers.", body)


def _foot(material: Material) -> str:
    said = (
        "Ω is the share of routable layers that run sparse, a mean over prompts; ideal and bound: what it could give."
    )
    return f"<footer>{said} Plan {escape(material.plan.digest()[:12])}.</footer>"


def _missing(title: str, command: str) -> str:
    return _section(title, "", _hint("Nothing is stored yet", command))


def _hint(said: str, command: str) -> str:
    text = f"{escape(said)}: <code>{escape(command)}</code> measures it."
    return f'<div class="card hint"><p>{text}</p></div>'


def _section(title: str, said: str, body: str) -> str:
    sub = f'<p class="sub">{escape(said)}</p>' if said else '<p class="sub"></p>'
    return f"<section><h2>{escape(title)}</h2>{sub}{body}</section>"


def _grid(figures: Sequence[Figure]) -> str:
    return f'<div class="grid">{"".join(map(_figure, figures))}</div>' if figures else ""


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    tall = ' class="tall"' if figure.height > 420 else ""
    return f'<figure id="{escape(figure.name)}"{tall}><h3>{escape(figure.title)}</h3>{inline(figure)}{caption}</figure>'


def _table(evaluation: dict[str, Any], suite: str) -> str:
    entries = entries_of(evaluation, suite)
    if not entries:
        return ""
    asked = any(entry["exact"] for entry in entries)
    head = ["system", "Ω", *(["exact match", "less dense"] if asked else []), "perplexity / dense", "prompts"]
    body = "".join(_row(entry, asked) for entry in entries)
    columns = "".join(f"<th>{escape(name)}</th>" for name in head)
    return (
        f'<h3>{escape(suite)}</h3><div class="scroll"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(entry: dict[str, Any], asked: bool) -> str:
    ratio = entry["sparse_ratio"]
    cells = [entry["system"], "" if ratio is None else f"{ratio:.3f}"]
    if asked:
        cells += [_interval(entry["exact"], ".2f"), _interval(entry["exact_less_dense"], "+.2f")]
    cells += [_interval(entry["perplexity_over_dense"], ".3f"), str(entry["prompts"])]
    return _cells(cells, entry["system"].startswith("fluxc"))


def _cells(cells: Sequence[str], ours: bool) -> str:
    mark = ' class="ours"' if ours else ""
    return f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _interval(values: list[float] | None, form: str) -> str:
    if values is None:
        return ""
    mean, low, high = (format(value, form) for value in values)
    return f"{mean} [{low}, {high}]"


def summary_of(material: Material) -> dict[str, Any]:
    """What the page leads with, as plain values."""
    found = {"model": material.name, "budget": shown_budget(material)}
    return found | {"tiles": [[tile.value, tile.meaning] for tile in tiles(material)], "words": in_words(material)}


def as_json(material: Material) -> str:
    """`summary_of` as text."""
    return json.dumps(summary_of(material), indent=1)
