"""`fluxc.export`: a calibrated model.flux becomes an engine directory."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.export.exported_program import ExportedProgram

from fluxc.artifact import versions
from fluxc.atomic import atomic_directory
from fluxc.engine.traced import TracedPrograms
from fluxc.errors import OptionError, SourceError, TargetError
from fluxc.exporters.engine_dir import NAME, PLAN, EngineManifest
from fluxc.exporters.layouts import check_layout, engine_folder, write_layout
from fluxc.exporters.parity import compare, expect
from fluxc.exporters.prepare import Prepared, budgets, check_budget, forms, prepare
from fluxc.exporters.readme import readme
from fluxc.exporters.targets import exporter
from fluxc.flux_dir import FluxDir, open_flux
from fluxc.hashed_files import entries_below
from fluxc.plan import Plan
from fluxc.preflight import check_space, check_target
from fluxc.progress import SILENT, Progress

_SMALL_FILES_BYTES = 64_000_000
_README = "README.md"


@dataclasses.dataclass(frozen=True)
class Exported:
    """An engine that was written, or with `dry_run` the one that would be: its place, and plain values about it."""

    path: Path
    report: dict[str, Any]


def export(
    model: str | Path | None = None,
    *,
    target: str,
    output: str | Path | None = None,
    verify: bool = True,
    force: bool = False,
    dry_run: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    pin: bool = False,
    layout: str | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Exported:
    """Write the engine directory of the model.flux `model` (None: the only *.flux here) for `target`.

    `output`: engine-<target> by default. `verify`: compare the engine with the routed program before it is kept.
    `dry_run`: check everything that is checked before long work, and write nothing. `dtype`, `device`: what the engine
    computes in and on, the model's own by default. `pin`: layers that the plan pins become attention without a
    conditional. `layout`: "triton-server" writes a model repository around the engine. `options`: max_length, batch,
    and those of the target (OnnxOptions, TrtOptions).

    Raises TargetError, before any work, for a target whose library is missing, and for a model it cannot express;
    OptionError for an option the target does not have; SourceError where there is not one *.flux; OutputExistsError,
    StorageError; ArchiveError for a damaged model; SelfCheckError where the engine computes something else. The
    directory is whole or not there.
    """
    maker = exporter(target)
    source, place = find_model(model), Path(output or f"engine-{target}")
    check_target(place, NAME, force)
    check_layout(layout)
    flux = open_flux(source)
    own, sizes = _split(maker, target, {**(options or {}), **({"pins": True} if pin else {})})
    made = prepare(flux, dtype=dtype, device=device, pin=pin, **sizes)
    settings = own | _filled(maker, flux, made)
    made = _limited(maker, made, settings)
    check_budget(flux.plan, made.pins, source)
    _check_full_kind(flux.plan, target)
    maker.check(made.program, **settings)
    weights = sum(entry.bytes for name, entry in flux.manifest.files.items() if name.endswith(".safetensors"))
    weights += sum(entry.bytes for entry in flux.manifest.links.values())
    check_space(place, weights * getattr(maker, "COPIES", 1) + _SMALL_FILES_BYTES)
    report = {"model": str(source), "engine": str(place), "target": target, "dry_run": dry_run}
    report |= {"attentions": flux.plan.model.layers, "routable": len(flux.plan.layers), "weight_bytes": weights}
    report |= {"pinned": len(made.pins), "forms": forms(made.program, made.pins)}
    if dry_run:
        return Exported(place, report)
    with atomic_directory(place, force) as root:
        inner = engine_folder(root, layout)
        manifest = _write(flux, made, maker, settings, target, inner, verify, progress)
        write_layout(root, layout, manifest)
    return Exported(place, report | _figures(manifest))


def _check_full_kind(plan: Plan, target: str) -> None:
    by_blocks = [layer.layer for layer in plan.layers if layer.full_kind == "block"]
    if by_blocks:
        raise TargetError(
            f"layer {by_blocks[0]} has the full kind block, which target {target} has no form of",
            hint="transform with --full-kind dense",
        )


def _split(maker: Any, target: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the target's own, and sizes that it does not build into its files."""
    known: frozenset[str] = getattr(maker, "OPTIONS", frozenset())
    sizes = {name: value for name, value in options.items() if name in ("max_length", "batch") and name not in known}
    unknown = set(options) - (known - {"context"}) - set(sizes)
    if unknown:
        name = min(unknown).replace("_", "-").replace("pins", "pin")
        raise OptionError(f"target {target} has no option --{name}", hint="`fluxc export --help` lists them by target")
    return {name: value for name, value in options.items() if name in known and name != "pins"}, sizes


def _filled(maker: Any, flux: FluxDir, made: Prepared) -> dict[str, Any]:
    """Options that a target has and nobody types: what it may need to know of the model, and the folded layers."""
    known: frozenset[str] = getattr(maker, "OPTIONS", frozenset())
    values = {"context": flux.plan.model.context, "pins": made.pins, "calibrated": flux.plan}
    values["eos_ids"] = [int(token) for token in flux.meta.get("eos_ids", [])]
    return {name: value for name, value in values.items() if name in known}


def _limited(maker: Any, made: Prepared, settings: Mapping[str, Any]) -> Prepared:
    """With the sizes that a target builds into its files."""
    if not hasattr(maker, "limits"):
        return made
    length, batch = maker.limits(**settings)
    return dataclasses.replace(made, max_length=length, batch=batch)


def find_model(model: str | Path | None) -> Path:
    """`model`, else the only *.flux directory here; raises SourceError where there is none, or several."""
    if model is not None:
        return Path(model)
    found = sorted(path for path in Path().glob("*.flux") if path.is_dir())
    if len(found) != 1:
        names = ", ".join(map(str, found))
        what = f"there are several *.flux here ({names})" if found else "there is no *.flux here"
        raise SourceError(what, hint="name one: fluxc export MODEL.flux --target onnx")
    return found[0]


def _write(
    flux: FluxDir,
    made: Prepared,
    maker: Any,
    settings: dict[str, Any],
    target: str,
    root: Path,
    verify: bool,
    progress: Progress,
) -> EngineManifest:
    progress.start("exporting")
    routed = made.take()
    programs = maker.build(routed, root, **settings)
    known = _known(routed, made.max_length or flux.plan.model.context)
    cases = expect(routed, flux.plan, progress, chosen=settings.get("plan") != "split") if verify else []
    del routed
    gc.collect()  # the weights of the program go before those of the engine come
    layers = known["layers"]
    verified = compare(maker.phases(root), cases, layers, flux.plan, progress).to_dict() if verify else {}
    if hasattr(maker, "tidy"):
        maker.tidy(root, **settings)
    progress.start("writing")
    (root / PLAN).write_text(flux.plan.to_json(), encoding="utf-8")
    if (flux.path / "tokenizer").is_dir():
        shutil.copytree(flux.path / "tokenizer", root / "tokenizer")
    manifest = EngineManifest(
        target=target,
        files=entries_below(root),
        plan=flux.plan.digest(),
        programs=programs,
        kv=maker.KV,
        meta=flux.meta,
        verified=verified,
        versions=versions() | maker.tools(),
        pins={str(layer): route for layer, route in made.pins.items()},
        budgets=budgets(flux.plan, made.pins),
        batch=made.batch,
        **known | {"layers": [dataclasses.asdict(layer) for layer in layers]},
    )
    return _finish(root, manifest, flux)


def _known(routed: ExportedProgram, context: int) -> dict[str, Any]:
    """What the manifest keeps of the program itself."""
    traced = TracedPrograms(routed, context=context, merge="no")
    names = ("layers", "vocabulary", "context", "rope_limit")
    types = {"dtype": str(traced.dtype).removeprefix("torch."), "device": str(traced.device)}
    return {name: getattr(traced, name) for name in names} | types


def _finish(root: Path, manifest: EngineManifest, flux: FluxDir) -> EngineManifest:
    """README and manifest, which know the other files."""
    (root / _README).write_text(readme(manifest, flux.plan), encoding="utf-8")
    manifest = dataclasses.replace(manifest, files=entries_below(root))
    (root / NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _figures(manifest: EngineManifest) -> dict[str, Any]:
    size = sum(entry.bytes for entry in manifest.files.values())
    built = {name: program["built"] for name, program in manifest.programs.items() if "built" in program}
    return {"bytes": size, "verified": manifest.verified, **({"built": built} if built else {})}
