"""The engine directory: what `fluxc export` writes and `open_engine` reads, whatever the target. Imports no torch.

engine.json     the manifest: target, hashes, signature, layers, tool versions
plan.json       biases per budget: another budget changes this file and its hash only
tokenizer/      files of the source                     README.md  how to load it
and the target's own files
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fluxc.atomic import atomic_file, storage_errors
from fluxc.errors import ArchiveError, PlanError
from fluxc.hashed_files import FileEntry, check_format, check_names, verify_file
from fluxc.json_form import dump, parse, read_text, strict
from fluxc.plan import Plan

NAME = "engine.json"
PLAN = "plan.json"
FORMAT = 1
_NEXT = ".next"


@dataclasses.dataclass(frozen=True)
class EngineManifest:
    """Contents of an engine directory.

    `target`: onnx, aoti or trt. `files` by path relative to the directory. `plan`: its digest. `dtype`, `device`: what
    the programs compute in and on. `programs`: for each phase its file and the dtype and shape of each input and
    output, free sizes by name. `layers`: the attentions in graph order (fluxc.engine.shapes.LayerShape), `vocabulary`,
    `context` (0: unknown) and `rope_limit` as in fluxc.engine.programs. `kv`: layout of the cache ("slots": one tensor
    [B,Hk,C,D] a layer). `meta`: what capture knew of the source. `verified`: largest error against the routed
    program for each check, empty where it was not verified. `versions`: the tools that wrote it. `pins`: routes of
    layers that are no conditionals, by model layer. `budgets`: smallest and largest full share they leave open.
    `batch`: most requests of a decode step, 0 for any.
    """

    target: str
    files: dict[str, FileEntry]
    plan: str
    dtype: str
    device: str
    programs: dict[str, Any]
    layers: list[dict[str, Any]]
    vocabulary: int
    context: int
    rope_limit: int
    kv: dict[str, Any]
    meta: dict[str, Any]
    verified: dict[str, Any]
    versions: dict[str, str]
    pins: dict[str, str] = dataclasses.field(default_factory=dict)
    budgets: list[float] = dataclasses.field(default_factory=lambda: [0.0, 1.0])
    batch: int = 0
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of `engine.json`."""
        return dump(dataclasses.asdict(self), ArchiveError, "the manifest of the engine")

    @classmethod
    def load(cls, path: Path) -> EngineManifest:
        """Read and check a manifest; raises ArchiveError for a newer format and for anything malformed."""
        values = parse(read_text(path, ArchiveError), ArchiveError, str(path))
        check_format(values, FORMAT, path)
        found = strict(cls, values, ArchiveError, str(path))
        if not isinstance(found.files, dict):
            raise ArchiveError(f"{path} lists no files")
        check_names(found.files, path)
        files = {
            name: strict(FileEntry, entry, ArchiveError, f"{name} in {path}") for name, entry in found.files.items()
        }
        return dataclasses.replace(found, files=files)


@dataclasses.dataclass(frozen=True)
class EngineDir:
    """An opened engine directory, its files checked."""

    path: Path
    manifest: EngineManifest
    plan: Plan


def open_engine(path: str | Path, target: str | None = None) -> EngineDir:
    """Open an engine directory after checking the hash of every file; nothing of it is executed.

    Raises ArchiveError, naming the file, for one that is damaged or missing, for a newer format, and for an engine of
    another target than `target`; PlanError for a plan that is not valid.
    """
    root = Path(path)
    if not (root / NAME).is_file():
        what = "is no engine directory" if root.exists() else "does not exist"
        raise ArchiveError(f"{root} {what}", hint="`fluxc export` writes one")
    manifest = EngineManifest.load(root / NAME)
    _finish(root, manifest)
    for name, entry in manifest.files.items():
        verify_file(root / name, entry, "is damaged: its SHA-256 is not the manifest's", "copy it or export it again")
    plan = Plan.load(root / PLAN)
    if plan.digest() != manifest.plan:
        raise ArchiveError(f"{root / PLAN} is not the plan the manifest was written for")
    if target and manifest.target != target:
        raise ArchiveError(f"{root} is an engine for {manifest.target}, not {target}")
    return EngineDir(root, manifest, plan)


def checked_plan(engine: EngineDir, plan: str | Path | Plan | None) -> Plan:
    """The engine's own plan, or another one for the same model, or its file; raises PlanError where it does not fit."""
    if plan is None:
        return engine.plan
    other = plan if isinstance(plan, Plan) else Plan.load(plan)
    other.check_model(engine.plan.model)
    if _fixed(other) != _fixed(engine.plan):
        raise PlanError(f"the plan has other kinds, sizes or pins than {engine.path}", hint="export the model again")
    return other


def update_plan(engine: EngineDir, plan: Plan) -> EngineDir:
    """Replace `plan.json` and its hash; raises PlanError for kinds or sizes other than the engine's, StorageError."""
    if (plan.model, plan.pool, plan.decode, plan.layers) != _fixed(engine.plan):
        raise PlanError(f"the plan has other kinds, sizes or pins than {engine.path}", hint="export the model again")
    check_budget(engine, plan.budget)
    waiting = engine.path / (PLAN + _NEXT)
    with storage_errors(engine.path):
        waiting.write_text(plan.to_json(), encoding="utf-8")
        files = engine.manifest.files | {PLAN: FileEntry.of(waiting)}
        manifest = dataclasses.replace(engine.manifest, files=files, plan=plan.digest())
        with atomic_file(engine.path / NAME, force=True) as file:  # the moment of commitment
            file.write_text(manifest.to_json(), encoding="utf-8")
    _finish(engine.path, manifest)
    return EngineDir(engine.path, manifest, plan)


def check_budget(engine: EngineDir, budget: float) -> None:
    """Raise PlanError for a budget that the layers folded into the engine do not leave open."""
    low, high = engine.manifest.budgets
    if not low <= budget <= high:
        raise PlanError(
            f"budget {budget:g}: {len(engine.manifest.pins)} folded layers of {engine.path} leave {low:g} to {high:g}",
            hint="export without --pin",
        )


def _fixed(plan: Plan) -> tuple[Any, ...]:
    return plan.model, plan.pool, plan.decode, plan.layers


def _finish(root: Path, manifest: EngineManifest) -> None:
    """Complete a change of plan that was cut off after its commitment, and forget one that was cut off before."""
    waiting = root / (PLAN + _NEXT)
    if not waiting.is_file():
        return
    with storage_errors(root):
        if FileEntry.of(waiting) == manifest.files.get(PLAN):
            waiting.replace(root / PLAN)
        else:
            waiting.unlink()
