"""The `model.flux/` directory (DESIGN section 4, Artifacts): weights once, two graphs without them, and small files.

    manifest.json          hashes, tensors, aliases, versions       routers.safetensors  the Layer Routers
    plan.json              kinds, sizes, biases per budget          tokenizer/           files of the source
    weights/*.safetensors  backbone, read by mmap                   measurements/        what calibration measured
    graphs/*.pt2           captured and routed, without weights     device.json          crossovers of this machine

Calibration and training replace `plan.json` and `routers.safetensors`; weights and graphs never change.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fluxc import manifest, pending
from fluxc.archive import save_program
from fluxc.atomic import atomic_directory
from fluxc.errors import InternalError, PlanError
from fluxc.flux_dir import PLAN, ROUTERS, FluxDir, graph_file, open_flux
from fluxc.ir.graph import argument, calls
from fluxc.linking import Links
from fluxc.manifest import FileEntry, Manifest
from fluxc.model_info import ModelInfo
from fluxc.passes.apply_plan import ApplyPlan, settings_of
from fluxc.passes.merge_linears import groups_of
from fluxc.plan import Plan
from fluxc.preflight import check_space, check_target
from fluxc.router import PREFIX, router_state
from fluxc.weight_files import (
    SHARD_BYTES,
    bytes_of,
    in_groups,
    split_aliases,
    weights_digest,
    write_shards,
    write_tensors,
)

_SMALL_FILES_BYTES = 64_000_000  # what graphs, tokenizer and manifest may take, for the check of free space

__all__ = ["FluxDir", "open_flux", "preflight", "update_flux", "update_plan", "update_routers", "write_flux"]

Contents = Mapping[str, bytes | str]


def write_flux(
    path: str | Path,
    captured: ExportedProgram,
    routed: ExportedProgram,
    plan: Plan,
    meta: dict[str, Any],
    tokenizer_files: Contents | None = None,
    measurements: Contents | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    links: Links | None = None,
) -> FluxDir:
    """Write a model.flux directory, whole or not at all, and open it.

    `links`: tensors that are not copied. The directory refers to their file by path and hash, and needs it as long as
    it lives.

    Raises PlanError for a plan of another model, OutputExistsError, StorageError (also when the disk is too small,
    before anything is written), and ArchiveError for a linked file that has changed.
    """
    links = links or Links()
    target = Path(path)
    preflight(target, captured, force, needs_weights=not links.entries)
    plan.check_model(ModelInfo.of(captured, meta, weights_digest(captured.state_dict)))
    _check_settings(routed, plan)
    with atomic_directory(target, force) as root:
        tensors, aliases = split_aliases(_backbone(captured, routed))
        linked = {name: links.entries[name] for name in tensors if name in links.entries}
        own = {name: tensor for name, tensor in tensors.items() if name not in linked}
        entries = linked | write_shards(in_groups(own, groups_of(routed)), root, "weights", shard_bytes)
        routers = write_tensors(router_state(routed), root, ROUTERS)
        _write_graphs(root, {"captured": captured, "routed": routed})
        _write_texts(root, {PLAN: plan.to_json()})
        _write_texts(root / "tokenizer", tokenizer_files or {})
        _write_texts(root / "measurements", measurements or {})
        files = {str(file.relative_to(root)): FileEntry.of(file) for file in sorted(root.rglob("*")) if file.is_file()}
        links.verify()
        made = Manifest(files, entries, aliases, routers, plan.digest(), meta, versions(), links.files)
        _write_texts(root, {manifest.NAME: made.to_json()})
    return open_flux(target)


def preflight(path: str | Path, captured: ExportedProgram, force: bool = False, needs_weights: bool = True) -> None:
    """What can be known to fail before calibration: an output that exists, a disk that is too small.

    `needs_weights` False: the weights are linked, not written.
    """
    target = Path(path)
    check_target(target, manifest.NAME, force)
    weights = bytes_of(split_aliases(captured.state_dict)[0].values()) if needs_weights else 0
    check_space(target, weights + _SMALL_FILES_BYTES)


def _backbone(captured: ExportedProgram, routed: ExportedProgram) -> dict[str, Tensor]:
    shared = {name: tensor for name, tensor in routed.state_dict.items() if not name.startswith(PREFIX)}
    own = captured.state_dict
    foreign = [name for name, t in shared.items() if name not in own or own[name].data_ptr() != t.data_ptr()]
    if foreign:
        raise InternalError(f"the routed program has a weight of its own, {foreign[0]!r}")
    return dict(own)


def _check_settings(routed: ExportedProgram, plan: Plan) -> None:
    nodes = calls(routed, torch.ops.fluxc.routed_attention)
    found = {argument(node, "layer"): settings_of(node) for node in nodes}
    pools = {argument(node, "pool") for node in calls(routed, torch.ops.fluxc.router_pool)}
    if found != ApplyPlan.of(plan).layers or pools != {plan.pool}:
        raise InternalError("the routed program has other kinds or sizes than the plan")


def _write_graphs(root: Path, programs: Mapping[str, ExportedProgram]) -> None:
    (root / "graphs").mkdir()
    for kind, program in programs.items():
        save_program(program, root / graph_file(kind), with_weights=False)


def _write_texts(folder: Path, contents: Contents) -> None:
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def versions() -> dict[str, str]:
    """Versions of the tools that shape an artifact."""
    packages = ("fluxc", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def update_flux(
    path: str | Path,
    plan: Plan | None = None,
    routers: Mapping[str, Tensor] | None = None,
    measurements: Contents | None = None,
) -> FluxDir:
    """Replace the plan, the routers, or add measurements, all at once or not at all; weights are not touched.

    Raises PlanError for a plan of another model, or one with other kinds or sizes than the graph, and for routers of
    other names or shapes.
    """
    flux = open_flux(path, verify_weights=False)
    plan = plan or flux.plan
    plan.check_model(flux.plan.model)
    if plan.pool != flux.plan.pool or ApplyPlan.of(plan) != ApplyPlan.of(flux.plan):
        raise PlanError(f"the plan has other kinds or sizes than the graph in {path}", hint="transform the model again")
    with pending.changes(flux.path) as change:
        change.write(PLAN, plan.to_json())
        for name, content in (measurements or {}).items():
            change.write(f"measurements/{name}", content)
        if routers is not None:
            _check_routers(flux, routers)
            write_tensors(routers, flux.path, change.reserve(ROUTERS))
        change.commit(flux.manifest, plan=plan.digest())
    return open_flux(path, verify_weights=False)


def _check_routers(flux: FluxDir, state: Mapping[str, Tensor]) -> None:
    known = {name: tuple(entry.shape) for name, entry in flux.manifest.routers.items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if known != given:
        wrong = sorted(name for name in known.keys() | given.keys() if known.get(name) != given.get(name))
        raise PlanError(
            f"router weight {wrong[0]!r} does not fit {flux.path}", hint="these are another model's routers"
        )


def update_plan(path: str | Path, plan: Plan) -> FluxDir:
    """Replace `plan.json` (and the manifest); see update_flux."""
    return update_flux(path, plan=plan)


def update_routers(path: str | Path, state: Mapping[str, Tensor]) -> FluxDir:
    """Replace `routers.safetensors` (and the manifest); see update_flux."""
    return update_flux(path, routers=state)
