"""An AOTI engine behind `fluxc.load`: the engine's programs over its own paged cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxc import kernels
from fluxc.engine.programs import LayerKV, Prefilled
from fluxc.engine.shapes import LayerShape
from fluxc.errors import ArchiveError, OptionError
from fluxc.exporters.aoti_recipe import Recipe
from fluxc.exporters.aoti_run import AotiProgram, open_program
from fluxc.exporters.engine_dir import EngineDir
from fluxc.exporters.machine import check_machine, check_torch
from fluxc.json_form import parse, read_text
from fluxc.tensor_file import map_tensors

RECIPES = "programs.json"
WEIGHTS = "weights"


class AotiPrograms:
    """`Programs` of an AOTI engine directory. Its programs are opened when they are first called.

    Raises TargetError for an engine that was built for another machine or another torch, OptionError for a device
    other than the engine's, ArchiveError for files that do not fit together.
    """

    def __init__(self, engine: EngineDir, device: str | None = None) -> None:
        kernels.register()
        found = engine.manifest
        if device is not None and torch.device(device).type != torch.device(found.device).type:
            raise OptionError(
                f"{engine.path} runs on {found.device}, not on {device}", hint="export the model again for that device"
            )
        self.layers = tuple(LayerShape(**layer) for layer in found.layers)
        self.vocabulary, self.context, self.rope_limit = found.vocabulary, found.context, found.rope_limit
        self.dtype: torch.dtype = getattr(torch, found.dtype)
        self.device = torch.device(found.device)
        self.opened = open_programs(engine.path, self.device, found.versions.get("torch", ""))

    def prefill(
        self, input_ids: Tensor, prompt_lens: Tensor, route_bias: Tensor, logits_at: Tensor, *, dense: bool = False
    ) -> Iterator[LayerKV | Prefilled]:
        """See `Programs.prefill`. `dense` forces every route to full; the routers run, and are not asked."""
        length = input_ids.shape[1]
        program, values = self.opened.prefill, dict[str, Tensor]()
        inputs = {
            "input_ids": input_ids,
            "position_ids": torch.arange(length, device=input_ids.device)[None],
            "seq_lens": torch.full_like(prompt_lens, length),
            "prompt_lens": prompt_lens,
            "route_bias": torch.full_like(route_bias, torch.inf) if dense else route_bias,
            "logits_at": logits_at,
        }
        index = 0
        for left in program.steps(inputs):
            named = _outputs(program.recipe, left)
            if index < len(self.layers) and f"k_{index}" in named:
                yield self._layer(index, named)
                index += 1
            values |= {name: value for name, value in named.items() if name in ("logits", "routes", "scores")}
            del named, left
        yield Prefilled(values["logits"], values["routes"][:, 0], None if dense else values["scores"][:, 0])

    def decode(
        self, cache: Tensor, input_ids: Tensor, position_ids: Tensor, slots: Tensor, page_table: Tensor, lens: Tensor
    ) -> Tensor:
        """See `Programs.decode`."""
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "cache": cache, "slots": slots}
        return self.opened.decode({**inputs, "page_table": page_table, "lens": lens})["logits"]

    def append(
        self,
        cache: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        seq_lens: Tensor,
        slots: Tensor,
        page_table: Tensor,
        lens: Tensor,
        start: Tensor,
        sinks: Tensor,
        windows: Tensor,
        logits_at: Tensor,
    ) -> Tensor:
        """See `Programs.append`."""
        last = (start + seq_lens - 1)[:, None]  # padding must not reach positions that turn the factors of a request
        inputs = {
            "input_ids": input_ids,
            "position_ids": torch.minimum(position_ids, last),
            "logits_at": logits_at,
            "cache": cache,
            "slots": slots,
            "page_table": page_table,
            "lens": lens,
            "start": start,
            "sinks": sinks,
            "windows": windows,
        }
        return self.opened.append(inputs)["logits"]

    def _layer(self, index: int, named: Mapping[str, Tensor]) -> LayerKV:
        row = self.layers[index].row
        route = None if row is None else bool(named[f"route_{row}"])
        return LayerKV(index, _alone(named[f"k_{index}"]), _alone(named[f"v_{index}"]), route)


class OpenedPrograms:
    """The three programs of an engine over one set of weights, each opened when it is first asked for."""

    def __init__(self, root: Path, recipes: Mapping[str, tuple[str, Recipe]], device: torch.device) -> None:
        self._root, self._recipes, self._device = root, recipes, device

    @functools.cached_property
    def prefill(self) -> AotiProgram:
        """Of one request."""
        return self._open("prefill")

    @functools.cached_property
    def decode(self) -> AotiProgram:
        """One token of each request."""
        return self._open("decode")

    @functools.cached_property
    def append(self) -> AotiProgram:
        """A further turn."""
        return self._open("append")

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        """Every weight by name: views of the mapped files on the CPU, copied once to another device."""
        found: dict[str, Tensor] = {}
        for path in sorted((self._root / WEIGHTS).glob("*.safetensors")):
            found |= map_tensors(path, _names(path))
        return found if self._device.type == "cpu" else {name: t.to(self._device) for name, t in found.items()}

    def _open(self, phase: str) -> AotiProgram:
        file, recipe = self._recipes[phase]
        return open_program(self._root / file, recipe, self._weights, self._device)


def open_programs(root: Path, device: torch.device, built_with: str) -> OpenedPrograms:
    """The programs in `root`, whose hashes were compared before; raises TargetError, ArchiveError as AotiPrograms."""
    kernels.register()
    values = parse(read_text(root / RECIPES, ArchiveError), ArchiveError, str(root / RECIPES))
    try:
        machine = values["machine"]
        recipes = {phase: (each["file"], Recipe.from_dict(each)) for phase, each in values["programs"].items()}
    except (KeyError, TypeError, AttributeError) as cause:
        raise ArchiveError(f"{root / RECIPES} describes no AOTI programs: {cause!r}") from cause
    check_machine(machine, root)
    check_torch(built_with, torch.__version__, root)
    return OpenedPrograms(root, recipes, device)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as cause:
        raise ArchiveError(f"{path} is no readable safetensors file: {cause}") from cause


def _outputs(recipe: Recipe, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: left[value] for name, value in recipe.outputs.items() if value in left}


def _alone(x: Tensor) -> Any:
    """The values in a storage of their own: part of a larger one would keep all of that alive."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone(memory_format=torch.contiguous_format)
