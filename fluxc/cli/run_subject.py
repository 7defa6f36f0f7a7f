"""What `fluxc run` runs: a model.flux directory, or an engine directory that `fluxc export` wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.engine.text import required
from fluxc.exporters import engine_dir

if TYPE_CHECKING:
    from fluxc.engine.engine import Engine
    from fluxc.plan import Plan


@dataclasses.dataclass(frozen=True)
class EngineSubject:
    """A loaded engine directory; has of `FluxModel` what a report of an answer needs."""

    engine: Engine

    @property
    def plan(self) -> Plan:
        """Its plan."""
        return self.engine.plan

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer; raises DataError where it has none."""
        return required(self.engine.tokenizer)

    def crossover(self, budget: float | None = None) -> int:
        """Prompts shorter than this many tokens run dense."""
        return self.engine.crossover(self.plan.budget if budget is None else budget)


def is_engine(path: Path) -> bool:
    """Whether `path` is an engine directory."""
    return (path / engine_dir.NAME).is_file()


def open_engine(path: Path, device: str | None) -> EngineSubject:
    """Load an engine directory; raises what `fluxc.load` raises."""
    from fluxc.engine.load import load

    return EngineSubject(load(path, device, max_batch=1))
