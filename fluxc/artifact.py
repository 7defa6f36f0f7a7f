"""The `model.flux/` directory (DESIGN section 4, Artifacts): weights once, two graphs without them, and small files.

    manifest.json          hashes, tensors, aliases, versions       routers.safetensors  the Layer Routers
    plan.json              kinds, sizes, biases per budget          tokenizer/           files of the source
    weights/*.safetensors  backbone, read by mmap                   measurements/        what calibration measured
    graphs/*.pt2           captured and routed, without weights     device.json          crossovers of this machine

Calibration and training replace `plan.json` and `routers.safetensors`; weights and graphs never change.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from fluxc import manifest, pending
from fluxc.archive import bind_weights, load_program, save_program
from fluxc.atomic import atomic_directory
from fluxc.errors import ArchiveError, InternalError, PlanError
from fluxc.ir.graph import argument, calls
from fluxc.manifest import FileEntry, Manifest
from fluxc.model_info import ModelInfo
from fluxc.plan import Plan
from fluxc.preflight import check_space, check_target
from fluxc.router import PREFIX, router_state
from fluxc.weight_files import (
    SHARD_BYTES,
    bytes_of,
    read_tensors,
    split_aliases,
    weights_digest,
    write_shards,
    write_tensors,
)

PLAN = "plan.json"
ROUTERS = "routers.safetensors"
DEVICE = "device.json"
GRAPHS = ("captured", "routed")
_SMALL_FILES_BYTES = 64_000_000  # what graphs, tokenizer and manifest may take, for the check of free space

Contents = Mapping[str, bytes | str]


@dataclasses.dataclass(frozen=True)
class FluxDir:
    """An opened model.flux directory. Tensors are read once, on first use, and shared by the programs it loads."""

    path: Path
    manifest: Manifest
    plan: Plan

    @property
    def meta(self) -> dict[str, Any]:
        """What capture knew of the source model."""
        return self.manifest.meta

    @property
    def device_file(self) -> Path:
        """Where crossovers measured on this machine are kept; need not exist."""
        return self.path / DEVICE

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        """Backbone tensors by name in the programs, memory-mapped; tied names share one tensor."""
        stored = read_tensors(self.path, self.manifest.tensors)
        return stored | {name: stored[owner] for name, owner in self.manifest.aliases.items()}

    @functools.cached_property
    def routers(self) -> dict[str, Tensor]:
        """Router tensors (`routers.<layer>.encoder.0.weight`, ...), memory-mapped."""
        return read_tensors(self.path, self.manifest.routers)

    def load(self, kind: Literal["routed", "captured"] = "routed") -> ExportedProgram:
        """A program with its weights bound; both kinds share the tensors. Raises ArchiveError for a hostile graph."""
        if kind not in GRAPHS:
            raise InternalError(f"a model.flux directory holds no program {kind!r}")
        program, _ = load_program(self.path / _graph(kind))
        return bind_weights(program, self.weights | (self.routers if kind == "routed" else {}))


def _graph(kind: str) -> str:
    return f"graphs/{kind}.pt2"


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
) -> FluxDir:
    """Write a model.flux directory, whole or not at all, and open it.

    Raises PlanError for a plan of another model, OutputExistsError, and StorageError (also when the disk is too small,
    before anything is written).
    """
    target = Path(path)
    preflight(target, captured, force)
    plan.check_model(ModelInfo.of(captured, meta, weights_digest(captured.state_dict)))
    _check_settings(routed, plan)
    with atomic_directory(target, force) as root:
        tensors, aliases = split_aliases(_backbone(captured, routed))
        entries = write_shards(tensors, root, "weights", shard_bytes)
        routers = write_tensors(router_state(routed), root, ROUTERS)
        _write_graphs(root, {"captured": captured, "routed": routed})
        _write_texts(root, {PLAN: plan.to_json()})
        _write_texts(root / "tokenizer", tokenizer_files or {})
        _write_texts(root / "measurements", measurements or {})
        files = {str(file.relative_to(root)): FileEntry.of(file) for file in sorted(root.rglob("*")) if file.is_file()}
        made = Manifest(files, entries, aliases, routers, plan.digest(), meta, versions())
        _write_texts(root, {manifest.NAME: made.to_json()})
    return open_flux(target)


def preflight(path: str | Path, captured: ExportedProgram, force: bool = False) -> None:
    """What can be known to fail before calibration: an output that exists, a disk that is too small."""
    target = Path(path)
    check_target(target, manifest.NAME, force)
    check_space(target, bytes_of(split_aliases(captured.state_dict)[0].values()) + _SMALL_FILES_BYTES)


def _backbone(captured: ExportedProgram, routed: ExportedProgram) -> dict[str, Tensor]:
    shared = {name: tensor for name, tensor in routed.state_dict.items() if not name.startswith(PREFIX)}
    own = captured.state_dict
    foreign = [name for name, t in shared.items() if name not in own or own[name].data_ptr() != t.data_ptr()]
    if foreign:
        raise InternalError(f"the routed program has a weight of its own, {foreign[0]!r}")
    return dict(own)


def _check_settings(routed: ExportedProgram, plan: Plan) -> None:
    nodes = {argument(node, "layer"): node for node in calls(routed, torch.ops.fluxc.routed_attention)}
    wanted = plan.settings()
    found = {layer: {name: argument(node, name) for name in wanted.get(layer, {})} for layer, node in nodes.items()}
    pools = {argument(node, "pool") for node in calls(routed, torch.ops.fluxc.router_pool)}
    if found != wanted or pools != {plan.pool}:
        raise InternalError("the routed program has other kinds or sizes than the plan")


def _write_graphs(root: Path, programs: Mapping[str, ExportedProgram]) -> None:
    (root / "graphs").mkdir()
    for kind, program in programs.items():
        save_program(program, root / _graph(kind), with_weights=False)


def _write_texts(folder: Path, contents: Contents) -> None:
    for name, content in contents.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def versions() -> dict[str, str]:
    """Versions of the tools that shape an artifact."""
    packages = ("fluxc", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def open_flux(path: str | Path, verify_weights: bool = True) -> FluxDir:
    """Open a model.flux directory after checking the hash of every file (`verify_weights` False: not the weights').

    Raises ArchiveError, naming the file, for one that is damaged or missing, and for a newer format; PlanError for a
    plan that is not valid.
    """
    root = Path(path)
    if not (root / manifest.NAME).is_file():
        what = "is no model.flux directory" if root.exists() else "does not exist"
        raise ArchiveError(f"{root} {what}", hint="fluxc transform MODEL writes one")
    pending.finish(root)
    found = Manifest.load(root / manifest.NAME)
    found.verify(root, (name for name in found.files if verify_weights or not name.startswith("weights/")))
    plan = Plan.load(root / PLAN)
    if plan.digest() != found.plan:
        raise ArchiveError(f"{root / PLAN} is not the plan the manifest was written for")
    return FluxDir(root, found, plan)


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
    if (plan.pool, plan.settings()) != (flux.plan.pool, flux.plan.settings()):
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
