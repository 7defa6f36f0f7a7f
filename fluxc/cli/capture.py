"""`fluxc capture`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.command import command
from fluxc.cli.outputs import check_file
from fluxc.cli.screen import Screen

if TYPE_CHECKING:
    from fluxc.capture.result import Capture

DTYPES = ("float32", "bfloat16", "float16")

model_argument = click.argument("model", metavar="MODEL")
dtype_option = click.option("--dtype", type=click.Choice(DTYPES), help="Number format, in place of the model's own.")


@command(
    "capture",
    makes=True,
    examples="""
    fluxc capture smollm2
    fluxc capture path/to/model-folder -o model.pt
    fluxc capture model.gguf --dtype bfloat16
    fluxc capture exported.pt2 -o model.pt
    """,
)
@model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), default="model.pt", show_default=True)
@dtype_option
def capture(screen: Screen, model: str, output: Path, dtype: str | None, force: bool, dry_run: bool) -> None:
    """Capture MODEL into one program file, checked against its source.

    MODEL is a Hugging Face folder or hub id (owner/name), a .gguf file, a .pt or .pt2 file that torch.export.save
    wrote, or smollm2, the demo model. The program has a dynamic batch and length and no KV cache.
    """
    check_file(output, force)
    if dry_run:
        _announce(screen, find(model), output)
    else:
        _capture(screen, model, output, dtype, force)


def _announce(screen: Screen, found: dict[str, Any], output: Path) -> None:
    screen.show(f"would capture {found['name']} ({found['kind']}) and write {output}")
    screen.result({"dry_run": True, "model": found, "output": str(output)})


def _capture(screen: Screen, model: str, output: Path, dtype: str | None, force: bool) -> None:
    begun = time.monotonic()
    captured = capture_model(screen, model, dtype)
    captured.save(output, force=force)
    seconds, size = round(time.monotonic() - begun, 2), output.stat().st_size
    screen.show(summary(captured), f"wrote {output} ({size / 1e6:.1f} MB) in {seconds:.1f} s")
    screen.result({"output": str(output), "bytes": size, "seconds": seconds, "meta": captured.meta})


def capture_model(screen: Screen, model: str, dtype: str | None) -> Capture:
    """Capture what a MODEL argument names, with progress."""
    from fluxc.capture import api

    captured = api.capture(model, dtype=dtype, progress=screen.progress())
    screen.close()
    return captured


def find(model: str) -> dict[str, Any]:
    """What a MODEL argument names, without loading it: name, kind, and path; raises SourceError or ArchiveError."""
    from fluxc.archive import inspect_archive
    from fluxc.capture.sources import locate

    path = Path(model)
    if path.is_file() and path.suffix in (".pt", ".pt2"):
        kind = "captured by fluxc" if inspect_archive(path).by_fluxc else "exported program"
        return {"name": model, "kind": kind, "path": str(path)}
    location = locate(model)
    kind = "GGUF file" if location.file else "folder" if location.local else "hub id"
    return {"name": location.name, "kind": kind, "path": str(Path(location.path, location.file))}


def summary(captured: Capture) -> str:
    """One line on what was captured."""
    meta = captured.meta
    facts = [f"{meta['source']}: {meta['family']}", f"{meta['layers']} layers"]
    facts += [f"context {meta['context']}", f"vocabulary {meta['vocab']}", str(meta["dtype"])]
    if check := meta.get("self_check"):
        facts.append(f"differs from its source by at most {check['max_error']:.1e} of the largest logit")
    return ", ".join(facts)
