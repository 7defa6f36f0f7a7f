"""The measured length below which SA does not pay (DESIGN section 1), kept in `device.json`.

Times of dense, all-full and all-sparse runs at growing lengths are stored by device, target, dtype and kind; since a
run's time is linear in Ω, the crossover of every budget follows from them.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import torch

from fluxc.atomic import atomic_file
from fluxc.errors import ArchiveError
from fluxc.json_form import dump, parse, read_text, strict
from fluxc.plan import LayerPlan, Plan, default_crossover

FORMAT = 1
TARGET = "eager"
FILE = "device.json"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Median seconds at each length (tokens, growing): dense program, routed with all layers full, all sparse."""

    lengths: tuple[int, ...]
    dense: tuple[float, ...]
    full: tuple[float, ...]
    sparse: tuple[float, ...]

    def pays(self, index: int, sparse_ratio: float) -> bool:
        """Whether the routed program at Ω = sparse_ratio is no slower than the dense one at lengths[index]."""
        full, sparse = self.full[index], self.sparse[index]
        return full + sparse_ratio * (sparse - full) <= self.dense[index]

    def crossover(self, sparse_ratio: float) -> int:
        """The shortest measured length from which on it pays; one past the longest where it does not pay there."""
        at = len(self.lengths)
        while at and self.pays(at - 1, sparse_ratio):
            at -= 1
        return self.lengths[at] if at < len(self.lengths) else self.lengths[-1] + 1


def of_plan(path: Path, plan: Plan, budget: float, device: str) -> int:
    """The crossover in tokens for `budget` on this machine, from the device file or by default."""
    found = read(path).get(key(plan, device)) if path.exists() else None
    return found.crossover(1 - budget) if found else default_crossover(plan)


def key(plan: Plan, device: str) -> str:
    """device / target / dtype / kind, as entries of the device file are named."""
    kinds = sorted({_sizes(layer) for layer in plan.layers})
    return "/".join((device_name(device), TARGET, plan.model.dtype, ",".join(kinds)))


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU with the number of threads torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} x{torch.get_num_threads()}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def read(path: Path) -> dict[str, Lengths]:
    """Entries of a device file; raises ArchiveError where it is damaged or newer than this version of fluxc."""
    values = parse(read_text(path, ArchiveError), ArchiveError, str(path))
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("entries"), dict):
        raise ArchiveError(f"{path} is no device file of format {FORMAT}", hint="delete it; it can be measured again")
    return {name: _lengths(value, path) for name, value in values["entries"].items()}


def _lengths(value: object, path: Path) -> Lengths:
    entry = strict(Lengths, value, ArchiveError, f"an entry of {path}")
    columns = dataclasses.astuple(entry)
    if not columns[0] or len({len(column) for column in columns}) != 1:
        raise ArchiveError(f"{path} has columns of different lengths", hint="delete it; it can be measured again")
    return Lengths(*map(tuple, columns))


def write(path: Path, name: str, lengths: Lengths) -> None:
    """Add or replace one entry; raises StorageError."""
    entries = (read(path) if path.exists() else {}) | {name: lengths}
    plain = {key: dataclasses.asdict(entry) for key, entry in entries.items()}
    text = dump({"format": FORMAT, "entries": plain}, ArchiveError, str(path))
    with atomic_file(path, force=True) as partial:
        partial.write_text(text, encoding="utf-8")


def _sizes(layer: LayerPlan) -> str:
    blocks = f"block-{layer.block}-{layer.threshold:g}"
    if layer.kind == "block":
        return blocks
    full = f"-full-{blocks}" if layer.full_kind == "block" else ""
    return f"{layer.kind}-{layer.sink}+{layer.window}{full}"
