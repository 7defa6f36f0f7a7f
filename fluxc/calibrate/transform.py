"""`fluxc.transform`: a model goes in, a routed model calibrated to a budget comes out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.export.exported_program import ExportedProgram

from fluxc.artifact import preflight, write_flux
from fluxc.calibrate.calibration import Calibration
from fluxc.calibrate.options import CalibrateOptions
from fluxc.calibrate.prompts import load_tokenizer, prompt_sets
from fluxc.capture.api import capture
from fluxc.errors import CaptureError
from fluxc.ir.observers import Dump, Verify
from fluxc.ir.pipeline import Observer, Pipeline
from fluxc.linking import link_weights, source_files
from fluxc.passes import route_pipeline
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.route_attention import RouteAttention
from fluxc.plan import Plan
from fluxc.progress import SILENT, Progress
from fluxc.train.published import check_routers, read_routers, with_published


@dataclasses.dataclass(frozen=True)
class Transformed:
    """What `transform` made: the model.flux directory, its plan, and how it was found (plain values)."""

    path: Path
    plan: Plan
    report: dict[str, Any]


def transform(
    model: Any,
    output: str | Path | None = None,
    *,
    budget: float | None = None,
    options: CalibrateOptions | None = None,
    prompts: str | Path | None = None,
    tokenizer: Any = None,
    dtype: str | None = None,
    device: str = "cpu",
    dump_dir: str | Path | None = None,
    link: bool = False,
    routers: str | Path | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Transformed:
    """Capture `model` (anything `fluxc.capture` takes), route it, calibrate it to a budget, and write a model.flux.

    `output`: the directory, by default named after the model in the working directory. `prompts`: a JSONL file in
    place of the built-in prompts. `device`: where calibration runs the model (cpu, cuda). Interrupted measurements
    are kept beside the output and taken up by the next call. `dump_dir`: the program after each pass goes there.
    `link`: do not copy the weights, refer to the safetensors files of the Hugging Face directory `model` by hash.
    `routers`: a safetensors file of trained routers of this model, which take the place of fitted ones.

    Raises what `capture` raises; SourceError for a model that cannot be linked to; OptionError and PlanError for
    options out of range; DataError for prompts that cannot be used; OutputExistsError and StorageError before any long
    work.
    """
    options = options or CalibrateOptions()
    if budget is not None:
        options = dataclasses.replace(options, budget=budget)
    started = time.perf_counter()
    target = Path(output) if output else default_output(model)
    files = source_files(model) if link else ()
    published = read_routers(routers) if routers else {}
    captured = capture(model, tokenizer=tokenizer, dtype=dtype, progress=progress)
    links = link_weights(captured.program, files) if link else None
    preflight(target, captured.program, force, needs_weights=not link)
    observers = (Verify(), Dump(dump_dir)) if dump_dir else (Verify(),)
    sets = prompt_sets(options, prompts, load_tokenizer(captured), captured.meta["context"])
    cache = target.with_name(target.name + ".measuring")
    routed = route(captured.program, options, observers)
    if published:
        check_routers(routed, published)
    found = Calibration(captured, routed, options, sets, cache, progress, device, observers).run()
    if routers:
        found = with_published(found, published, Path(routers).name, sets, progress, device)
    report = {**found.report, "seconds": round(time.perf_counter() - started, 1)}
    progress.start("writing")
    write_flux(
        target,
        captured.program,
        found.program,
        found.plan,
        captured.meta,
        captured.tokenizer_files,
        {"calibration.json": json.dumps(report, indent=1), "needs.json": json.dumps(found.measurements)},
        force=force,
        links=links,
    )
    shutil.rmtree(cache, ignore_errors=True)
    return Transformed(target, found.plan, report)


def route(program: ExportedProgram, options: CalibrateOptions, observers: Sequence[Observer] = ()) -> ExportedProgram:
    """The captured program with an untrained router in front of every routable attention.

    Raises CaptureError where no attention is routable.
    """
    passes = route_pipeline(pool=options.pool, seed=options.seed).passes
    result = Pipeline(passes, observers).run(program, "captured")
    if not result.count(RouteAttention.name):
        reasons = "; ".join(sorted({note.reason for note in result.notes(InsertRouters.name)}))
        why = reasons or "it has no attention"
        raise CaptureError(f"nothing in this model can be routed: {why}", hint="see `fluxc inspect`")
    return result.program


def default_output(model: Any) -> Path:
    """`<name of the model>.flux` in the working directory."""
    name = Path(model).absolute().resolve().name if isinstance(model, (str, Path)) else type(model).__name__
    stem = Path(name).stem if Path(name).suffix in (".pt", ".pt2", ".gguf") else name
    return Path(f"{stem}.flux")
