"""`fluxc.export`: a calibrated model.flux becomes an engine directory."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.export.exported_program import ExportedProgram

from fluxc.artifact import versions
from fluxc.atomic import atomic_directory
from fluxc.engine.traced import TracedPrograms
from fluxc.errors import OptionError, SourceError
from fluxc.exporters.engine_dir import NAME, PLAN, EngineManifest
from fluxc.exporters.parity import check_parity
from fluxc.exporters.readme import readme
from fluxc.exporters.targets import exporter
from fluxc.flux_dir import FluxDir, open_flux
from fluxc.hashed_files import entries_below
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
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Exported:
    """Write the engine directory of the model.flux `model` (None: the only *.flux here) for `target`.

    `output`: engine-<target> by default. `verify`: compare the engine with the routed program before it is kept.
    `dry_run`: check everything that is checked before long work, and write nothing. `options`: those of the target
    (TrtOptions for trt).

    Raises TargetError, before any work, for a target whose library is missing, and for a model it cannot express;
    OptionError for an option the target does not have; SourceError where there is not one *.flux; OutputExistsError,
    StorageError; ArchiveError for a damaged model; SelfCheckError where the engine computes something else. The
    directory is whole or not there.
    """
    maker = exporter(target)
    source, place = find_model(model), Path(output or f"engine-{target}")
    check_target(place, NAME, force)
    flux = open_flux(source)
    routed = flux.load("routed")
    settings = _settings(maker, target, options or {}, flux.plan.model.context)
    maker.check(routed, **settings)
    weights = sum(entry.bytes for name, entry in flux.manifest.files.items() if name.endswith(".safetensors"))
    weights += sum(entry.bytes for entry in flux.manifest.links.values())
    check_space(place, weights + _SMALL_FILES_BYTES)
    report = {"model": str(source), "engine": str(place), "target": target, "dry_run": dry_run}
    report |= {"attentions": flux.plan.model.layers, "routable": len(flux.plan.layers), "weight_bytes": weights}
    if dry_run:
        return Exported(place, report)
    with atomic_directory(place, force) as root:
        manifest = _write(flux, routed, maker, settings, target, root, verify, progress)
    return Exported(place, report | _figures(manifest))


def _settings(maker: Any, target: str, options: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The options the target gets: those given, and the model's context where it has such an option."""
    known = getattr(maker, "OPTIONS", frozenset())
    unknown = set(options) - (known - {"context"})
    if unknown:
        name = min(unknown).replace("_", "-")
        raise OptionError(f"target {target} has no option --{name}", hint="`fluxc export --help` lists them by target")
    return {**options, **({"context": context} if "context" in known else {})}


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
    routed: ExportedProgram,
    maker: Any,
    settings: dict[str, Any],
    target: str,
    root: Path,
    verify: bool,
    progress: Progress,
) -> EngineManifest:
    progress.start("exporting")
    programs = maker.build(routed, root, **settings)
    traced = TracedPrograms(routed, context=flux.plan.model.context, merge="no")
    verified: dict[str, Any] = {}
    if verify:
        chosen = settings.get("plan") != "split"
        engine = maker.phases(root)
        verified = check_parity(engine, routed, traced.layers, flux.plan, progress, chosen=chosen).to_dict()
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
        dtype=str(traced.dtype).removeprefix("torch."),
        device=str(traced.device),
        programs=programs,
        layers=[dataclasses.asdict(layer) for layer in traced.layers],
        vocabulary=traced.vocabulary,
        context=traced.context,
        rope_limit=traced.rope_limit,
        kv=maker.KV,
        meta=flux.meta,
        verified=verified,
        versions=versions() | maker.tools(),
    )
    return _finish(root, manifest, flux)


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
