"""Capturing a program that somebody exported with torch.export, or an nn.Module that is exported here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from fluxc import kernels
from fluxc.capture.foreign_check import Original, check_program
from fluxc.capture.foreign_export import check_frozen, check_writes, export_captured, only_logits
from fluxc.capture.result import Capture, files_of_tokenizer
from fluxc.errors import CaptureError
from fluxc.ir.evaluate import Evaluator
from fluxc.ir.graph import Draft, argument, calls, is_call, user_inputs, walk_back
from fluxc.ir.pass_base import Note, Pass
from fluxc.ir.verifier import problems, verify
from fluxc.passes.canonicalize_attention import CanonicalizeAttention
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.drop_asserts import DropAsserts
from fluxc.passes.drop_no_ops import DropNoOps
from fluxc.passes.expose_positions import ExposePositions
from fluxc.passes.inline_regions import InlineRegions
from fluxc.progress import SILENT, Progress
from fluxc.signature import CAPTURED_INPUTS

aten = torch.ops.aten
_NORMAL_FORM: tuple[Pass, ...] = (InlineRegions(), DropAsserts(), DropNoOps(), DeadCode())


def capture_file(path: str | os.PathLike[str], *, tokenizer: Any = None, progress: Progress = SILENT) -> Capture:
    """Capture the `.pt` / `.pt2` file `path`, whoever wrote it with `torch.export.save`.

    Raises ArchiveError for a damaged or hostile file, and what `capture_program` raises.
    """
    from fluxc.archive import load_program

    progress.start("reading the program")
    program, _ = load_program(path)
    return capture_program(program, source=str(path), tokenizer=tokenizer, progress=progress)


def capture_module(
    model: torch.nn.Module, sample_inputs: tuple[Any, ...], *, tokenizer: Any = None, progress: Progress = SILENT
) -> Capture:
    """Capture an nn.Module that takes token ids [B,S] (and a padding mask or positions of that shape), returns logits.

    `sample_inputs` is exported with batch and length free. Raises CaptureError where that fails, and what
    `capture_program` raises.
    """
    progress.start("exporting the module")
    try:
        program = _exported(model, sample_inputs)
    except Exception as error:  # the exporter raises many types
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"{type(model).__name__} cannot be exported with a free batch and length: {reason}",
            hint="give sample inputs of at least 2 rows and 2 tokens, and no cache",
        ) from error
    return capture_program(program, source=type(model).__name__, tokenizer=tokenizer, progress=progress)


def _exported(model: torch.nn.Module, sample_inputs: tuple[Any, ...]) -> ExportedProgram:
    """Free from 1, else from 2 or as the exporter finds (SDPA, grouped heads, torch 2.11); capture widens it."""
    for sizes in ((Dim("B", min=1), Dim("S", min=1)), (Dim("B", min=2), Dim("S", min=2))):
        with contextlib.suppress(Exception):  # the exporter raises many types
            return _exported_with(sizes, model, sample_inputs)
    return _exported_with((Dim.DYNAMIC, Dim.DYNAMIC), model, sample_inputs)


def _exported_with(sizes: tuple[Any, Any], model: torch.nn.Module, sample_inputs: tuple[Any, ...]) -> ExportedProgram:
    B, S = sizes
    rank = {1: {0: S}, 2: {0: B, 1: S}}
    shapes = tuple(rank.get(x.dim()) if isinstance(x, torch.Tensor) else None for x in sample_inputs)
    with torch.no_grad():
        return torch.export.export(model, sample_inputs, dynamic_shapes=shapes, strict=False)


def capture_program(
    program: ExportedProgram,
    *,
    self_check: bool = True,
    source: str = "program",
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> Capture:
    """Rewrite `program` to the captured normal form; it is not changed, and its weights are shared.

    Batch and length become free from 1, also where the program was exported for lengths from 2 (`Dim.DYNAMIC`): that
    is tried when it is exported again, and checked on one token. `self_check` compares with the given program at
    three lengths. `meta["attentions"]` holds what was decided about each attention.

    Raises CaptureError (UnsupportedAttentionError) for what fluxc does not represent, SelfCheckError where the result
    differs.
    """
    kernels.register()
    if user_inputs(program) == CAPTURED_INPUTS:
        _check_captured(program)
        return Capture(program, _meta(program, source, None, {}), files_of_tokenizer(tokenizer))
    progress.start("recognising attention and positions")
    check_frozen(program)
    original = Original(program)
    found = CanonicalizeAttention().apply(_prepared(program))
    if found.count == 0:
        raise CaptureError("the program has no attention that fluxc can find", hint="is it a language model?")
    exposed = ExposePositions().apply(found.program).program
    progress.start("exporting again")
    captured = _applied(export_captured(exposed, original.longest), *_NORMAL_FORM)
    verify(captured, "captured")
    check: dict[str, Any] = {}
    if self_check:
        progress.start("checking")
        check = check_program(captured, original, _dtype(captured), _windows(captured))
    meta = _meta(captured, source, original.longest, check)
    meta["attentions"] = [{"node": note.node, "found": note.reason} for note in found.notes]
    return Capture(captured, meta, files_of_tokenizer(tokenizer))


def attention_notes(program: ExportedProgram) -> tuple[Note, ...]:
    """What `capture_program` would decide about each attention of a program, refusals included, without rewriting."""
    check_frozen(program)
    return CanonicalizeAttention(strict=False).apply(_prepared(program)).notes


def _check_captured(program: ExportedProgram) -> None:
    """A program with the captured signature is taken as it is, if it also keeps the other rules."""
    check_frozen(program)
    check_writes(program)
    found = problems(program, "captured")
    if found:
        raise CaptureError(f"the program has the inputs of a captured one, but {found[0]}", hint="capture it again")


def _prepared(program: ExportedProgram) -> ExportedProgram:
    flat = _applied(only_logits(program), *_NORMAL_FORM)
    check_writes(flat)
    return flat


def _applied(program: ExportedProgram, *steps: Pass) -> ExportedProgram:
    for step in steps:
        program = step.apply(program).program
    return program


def _dtype(program: ExportedProgram) -> torch.dtype:
    """The dtype of the token embedding."""
    return _token_embedding(program).dtype


def _windows(program: ExportedProgram) -> list[int]:
    return sorted({argument(node, "window") for node in calls(program, torch.ops.fluxc.attention)})


def _token_embedding(program: ExportedProgram) -> torch.Tensor:
    found = next(node for node in calls(program, aten.embedding) if _reads(node, "input_ids"))
    return found.args[0].meta["val"]  # type: ignore[union-attr]


def _reads(node: Any, name: str) -> bool:
    return any(source.name == name for source in walk_back(node.args[1], lambda _: False))


def _meta(program: ExportedProgram, source: str, longest: int | None, check: dict[str, Any]) -> dict[str, Any]:
    embedding = _token_embedding(program)
    return {
        "source": source,
        "family": "program",
        "context": _context(program, longest),
        "vocab": _logits_width(program),
        "layers": len(calls(program, torch.ops.fluxc.attention)),
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "eos_ids": [],
        "self_check": check,
        "versions": {name: importlib.metadata.version(name) for name in ("fluxc", "torch")},
    }


def _logits_width(program: ExportedProgram) -> int:
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    return int(output.args[0][0].meta["val"].shape[-1])


def _context(program: ExportedProgram, longest: int | None) -> int:
    """Tokens the program has positions for: the smallest table of positions, or the exported limit; 0 if unknown."""
    draft = Draft(program)
    limits = [longest] if longest else []
    for node in draft.graph.nodes:
        if is_call(node, aten.embedding) and not _reads(node, "input_ids") and _reads(node, "position_ids"):
            limits.append(_rows(draft, node.args[0], node.args[1]))
        if is_call(node, aten.index_select) and node.args[0].op == "placeholder":
            limits.append(int(node.args[0].meta["val"].shape[node.args[1]]))
    return min(limits, default=0)


def _rows(draft: Draft, table: Any, index: Any) -> int:
    """Rows of a table of learned positions, less those before position 0's."""
    positions = draft.user_input("position_ids")
    sizes: Callable[[int], Any] = lambda axis: positions.meta["val"].shape[axis].node.expr  # noqa: E731
    first = Evaluator(draft, {sizes(0): 1, sizes(1): 1}, {positions: torch.zeros(1, 1, dtype=torch.int64)})(index)
    return int(table.meta["val"].shape[0]) - int(first.flatten()[0])
