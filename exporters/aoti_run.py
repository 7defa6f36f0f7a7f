"""Runs programs of an AOTI package, piece by piece, over weights that stay where the caller has them.

A package is native code: it is opened only after `open_engine` compared its hash.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxc.errors import ArchiveError
from fluxc.exporters.aoti_recipe import Call, Recipe, row_of

Piece = Callable[[list[Tensor]], Sequence[Tensor]]


class AotiProgram:
    """One program: call it with its inputs by name, or take what each call leaves as soon as it is there.

    `pieces`: for each call of the recipe, the compiled piece with the weights of that call.
    """

    def __init__(self, recipe: Recipe, pieces: Sequence[Piece]) -> None:
        self.recipe = recipe
        self._pieces = tuple(pieces)
        self._last = recipe.last_uses()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, for inputs by name; those the program does not read may be there too."""
        wanted, found = set(self.recipe.outputs.values()), dict[str, Tensor]()
        for left in self.steps(inputs):
            found |= {name: value for name, value in left.items() if name in wanted}
        return {name: found[value] for name, value in self.recipe.outputs.items()}

    def steps(self, inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """What each call leaves, by the name of the value; a value is forgotten here after its last use."""
        values = {name: inputs[name].contiguous() for name in self.recipe.inputs}
        for number, (call, piece) in enumerate(zip(self.recipe.calls, self._pieces, strict=True)):
            taken = [_taken(values, name) for name in call.enters]
            for name in [name for name in values if self._last.get(name, -1) <= number]:
                del values[name]
            left = dict(zip(call.leaves, piece(taken), strict=True))
            taken.clear()
            values |= {name: value for name, value in left.items() if number < self._last.get(name, -1)}
            yield left
            del left


def _taken(values: Mapping[str, Tensor], name: str) -> Tensor:
    value, row = row_of(name)
    return values[value] if row is None else values[value][row]


def open_program(package: Path, recipe: Recipe, weights: Mapping[str, Tensor], device: torch.device) -> AotiProgram:
    """The program of `recipe` from a package; its constants are `weights` themselves, not copies.

    Calls of one piece share its code and differ in their constants. Raises ArchiveError for a package without a piece
    that the recipe calls, and for weights that are missing.
    """
    folder = Path(tempfile.mkdtemp(prefix="fluxc-aoti-"))
    try:
        libraries = {piece: _extract(package, piece, folder) for piece in recipe.pieces}
        return AotiProgram(recipe, [_open(libraries[call.piece], call, weights, device) for call in recipe.calls])
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # the code is mapped, and needs no name


def _extract(package: Path, piece: str, folder: Path) -> Path:
    """The shared library of a piece and the list of its ops beside it; where the library is."""
    own = folder / piece
    own.mkdir()
    try:
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                if f"/data/aotinductor/{piece}/" in name and name.endswith((".so", ".json", ".cubin")):
                    (own / Path(name).name).write_bytes(archive.read(name))
    except (zipfile.BadZipFile, OSError, NotImplementedError) as cause:
        raise ArchiveError(f"{package} is no AOTI package: {cause}") from cause
    found = list(own.glob("*.so"))
    if len(found) != 1:
        raise ArchiveError(f"{package} holds {len(found)} libraries of {piece}, not one")
    return found[0]


def _open(library: Path, call: Call, weights: Mapping[str, Tensor], device: torch.device) -> Piece:
    runner: Any = _runner(library, device)
    originals = runner.get_constant_names_to_original_fqns()
    try:
        constants = {name: weights[call.weights[original]] for name, original in originals.items()}
    except KeyError as cause:
        raise ArchiveError(f"the engine has no weight {cause} for {call.piece}") from cause
    if constants:
        runner.update_constant_buffer(constants, False, True, True)  # not the inactive set, all of them, not copied
    run: Piece = runner.run
    return run


def _runner(library: Path, device: torch.device) -> Any:
    runners = torch._C._aoti
    if device.type == "cuda":
        return runners.AOTIModelContainerRunnerCuda(str(library), 1, str(device), str(library.parent))
    return runners.AOTIModelContainerRunnerCpu(str(library), 1)
