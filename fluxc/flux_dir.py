"""Reading a model.flux directory: hashes first, then programs over one set of memory-mapped weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.export import ExportedProgram

from fluxc import manifest, pending
from fluxc.archive import bind_weights, load_program
from fluxc.errors import ArchiveError, InternalError
from fluxc.manifest import Manifest
from fluxc.passes.merge_linears import groups_of
from fluxc.plan import Plan
from fluxc.weight_files import pack, read_tensors

PLAN = "plan.json"
ROUTERS = "routers.safetensors"
DEVICE = "device.json"
GRAPHS = ("captured", "routed")


@dataclasses.dataclass(frozen=True)
class FluxDir:
    """An opened model.flux directory. Tensors are read once, on first use, and shared by the programs it loads."""

    path: Path
    manifest: Manifest
    plan: Plan
    _moved: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict, repr=False, compare=False)

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
        return self._with_aliases(stored)

    @functools.cached_property
    def routers(self) -> dict[str, Tensor]:
        """Router tensors (`routers.<layer>.encoder.0.weight`, ...), memory-mapped."""
        return read_tensors(self.path, self.manifest.routers)

    def load(self, kind: Literal["routed", "captured"] = "routed", device: str = "cpu") -> ExportedProgram:
        """A program on `device` with its weights bound; both kinds share the tensors.

        Raises ArchiveError for a graph that is damaged or hostile, OptionError for a device that is not here.
        """
        if kind not in GRAPHS:
            raise InternalError(f"a model.flux directory holds no program {kind!r}")
        program, _ = load_program(self.path / graph_file(kind))
        weights = self._weights_on(device, program)
        program = program if device == "cpu" else _placed(program, device)
        return bind_weights(program, weights | (self._routers_on(device) if kind == "routed" else {}))

    def _weights_on(self, device: str, program: ExportedProgram) -> dict[str, Tensor]:
        """The weights on `device`; those that `merge-linears` finds in the program lie side by side there."""
        if device == "cpu":
            return self.weights
        if device not in self._moved:
            stored = {name: self.weights[name] for name in self.manifest.tensors}
            self._moved[device] = self._with_aliases(pack(stored, groups_of(program), device))
        return self._moved[device]

    def _routers_on(self, device: str) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in self.routers.items()}

    def _with_aliases(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return stored | {name: stored[owner] for name, owner in self.manifest.aliases.items()}


def graph_file(kind: str) -> str:
    """Where the program `kind` stands in the directory."""
    return f"graphs/{kind}.pt2"


def _placed(program: ExportedProgram, device: str) -> ExportedProgram:
    """The graph on `device`; weights come later, constants are moved here."""
    from fluxc.passes.place import Place

    placed = Place(device, weights=False).apply(program).program
    placed.constants.update({name: value.to(device) for name, value in placed.constants.items()})
    return placed


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
    found.verify(root, verify_weights)
    plan = Plan.load(root / PLAN)
    if plan.digest() != found.plan:
        raise ArchiveError(f"{root / PLAN} is not the plan the manifest was written for")
    return FluxDir(root, found, plan)
