"""`fluxc inspect`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.capture import capture_model, model_argument
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import size, table

if TYPE_CHECKING:
    from rich.table import Table
    from torch.export import ExportedProgram

    from fluxc.ir.inspect import AttentionRecord
    from fluxc.ir.pass_base import Note
    from fluxc.plan import Plan


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found under a name. `notes`: what capture would say of each attention of a foreign program."""

    name: str
    kind: str
    program: ExportedProgram
    meta: dict[str, Any]
    records: list[AttentionRecord]
    notes: tuple[Note, ...] = ()
    plan: Plan | None = None


@command(
    "inspect",
    examples="""
    fluxc inspect model.pt
    fluxc inspect model.flux
    fluxc inspect exported.pt2
    fluxc inspect model.pt --graph | less
    """,
)
@model_argument
@click.option("--graph", is_flag=True, help="Print the program in fluxc's text form instead.")
def inspect(screen: Screen, model: str, graph: bool) -> None:
    """List every attention of MODEL: its sizes, whether it can be routed, and why not.

    MODEL is a captured model.pt, a model.flux folder, or anything `fluxc capture` takes. Of an exported program that
    fluxc has not captured, each attention is listed with what capture would make of it.
    """
    found = _find(screen, model)
    text = _graph(found.program) if graph else None
    if text is not None:
        screen.answer(text)
    elif found.notes:
        screen.show(_notes(found))
    else:
        screen.show(_summary(found), _attentions(found), *_plan_lines(found.plan))
    screen.result({**_result(found), **({} if text is None else {"graph": text})})


def _find(screen: Screen, model: str) -> Found:
    from fluxc.archive import inspect_archive

    path = Path(model)
    if path.is_dir() and not (path / "config.json").exists():
        return _flux(screen, path)
    if path.is_file() and path.suffix in (".pt", ".pt2") and not inspect_archive(path).by_fluxc:
        return _foreign(screen, path)
    captured = capture_model(screen, model, None)
    return Found(model, "captured", captured.program, captured.meta, _records(captured.program))


def _flux(screen: Screen, path: Path) -> Found:
    from fluxc.flux_dir import open_flux

    screen.progress().start("checking and loading the model")
    flux = open_flux(path)
    program = flux.load("routed")
    return Found(str(path), "routed", program, flux.meta, _records(program), plan=flux.plan)


def _foreign(screen: Screen, path: Path) -> Found:
    from fluxc.archive import load_program
    from fluxc.capture.program import attention_notes

    screen.progress().start("reading the program")
    program, _ = load_program(path)
    return Found(str(path), "exported", program, {}, [], attention_notes(program))


def _records(program: ExportedProgram) -> list[AttentionRecord]:
    from fluxc.ir.inspect import inspect_program

    return inspect_program(program)


def _graph(program: ExportedProgram) -> str:
    from fluxc.ir.printer import program_text

    return program_text(program).rstrip("\n")


def _summary(found: Found) -> str:
    routable = sum(record.routable for record in found.records)
    meta, weights = found.meta, _weights(found.program)
    return (
        f"[bold]{found.name}[/] ({found.kind}): {meta.get('family', 'program')}, {meta.get('dtype', 'dtype unknown')}, "
        f"context {meta.get('context', 'unknown')}; {weights['parameters'] / 1e6:.1f} M parameters, "
        f"{size(weights['bytes'])}; {len(found.records)} attentions, {routable} routable"
    )


def _weights(program: ExportedProgram) -> dict[str, int]:
    """Parameters and bytes; a tensor that two names share counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in program.state_dict.values()}.values()
    sizes = [(tensor.numel(), tensor.numel() * tensor.element_size()) for tensor in tensors]
    return {"parameters": sum(count for count, _ in sizes), "bytes": sum(taken for _, taken in sizes)}


def _attentions(found: Found) -> Table:
    made = table("layer", "where", "heads", "width", "routable", "the router reads, or why not", "sparse")
    for record in found.records:
        made.add_row(
            str(record.layer),
            record.path or record.node,
            f"{record.heads}/{record.kv_heads}",
            str(record.head_dim) if record.head_dim == record.value_dim else f"{record.head_dim}, {record.value_dim}",
            "yes" if record.routable else "no",
            record.query if record.routable else record.reason,
            _sparse(record.sparse),
        )
    return made


def _sparse(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return ""
    blocks = f"block {settings['block']} threshold {settings['threshold']:g}"
    if settings["kind"] == "block":
        return blocks
    last = f" last {settings['last']}" if settings["last"] else ""
    full = f", full: {blocks}" if settings["full_kind"] == "block" else ""
    return f"{settings['kind']} {settings['sink']} + {settings['window']}{last}{full}"


def _notes(found: Found) -> Table:
    made = table("node", "found", "what, or why not")
    for note in found.notes:
        made.add_row(note.node, "yes" if note.matched else "no", note.reason)
    return made


def _plan_lines(plan: Plan | None) -> list[str]:
    if plan is None:
        return []
    budgets = [point.budget for point in plan.curve]
    pins = [f"{layer.layer} {layer.pin}" for layer in plan.layers if layer.pin]
    lines = [
        f"[bold]budget[/] {plan.budget:g} (Ω {1 - plan.budget:g}); `fluxc calibrate` can choose {budgets[0]:g} to "
        f"{budgets[-1]:g}",
        f"[bold]decode[/] {plan.decode}",
    ]
    return lines + ([f"[bold]pinned[/] {', '.join(pins)}"] if pins else [])


def _result(found: Found) -> dict[str, Any]:
    return {
        "name": found.name,
        "kind": found.kind,
        "meta": found.meta,
        "weights": _weights(found.program),
        "attentions": [record.to_dict() for record in found.records],
        "notes": [dataclasses.asdict(note) for note in found.notes],
        "plan": found.plan.to_dict() if found.plan else None,
    }
