"""Options and fixtures of the whole suite."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.export.exported_program import ExportedProgram

ROOT = Path(__file__).resolve().parent.parent

# Before anything imports transformers: it would take our top-level `kernels` folder for Hugging Face's package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# One thread a worker: two workers share two cores, and tiny models gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="write golden files instead of comparing with them")


class Golden:
    """Compares text with `golden/<stem of the test file without test_>/<name>.txt` beside the test file."""

    def __init__(self, folder: Path, bless: bool) -> None:
        self._folder, self._bless = folder, bless

    def check(self, name: str, text: str) -> None:
        """Assert that `text` is the golden file's content; with --bless, make it so."""
        path = self._folder / f"{name}.txt"
        if self._bless:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.rstrip("\n") + "\n")
        assert path.exists(), f"{path.name} is missing: run pytest --bless and read the new file"
        assert text.rstrip("\n") == path.read_text().rstrip("\n")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    path = Path(request.path)
    folder = path.parent / "golden" / path.stem.removeprefix("test_")
    return Golden(folder, request.config.getoption("--bless"))


@pytest.fixture(scope="session")
def toy() -> Callable[..., ExportedProgram]:
    """`toy_program` with a memory: each ToyConfig is exported once a session. Passes never change a program."""
    from fluxc.testing import ToyConfig, toy_program

    return functools.cache(lambda config=None: toy_program(config or ToyConfig()))


@pytest.fixture(scope="session")
def toy_routed(toy: Callable[..., ExportedProgram]) -> Callable[..., ExportedProgram]:
    """`toy` with routers and routed attention, sink 2 and window 4 in every routable layer; remembered as well."""
    from fluxc.ir.sparse import SparseSettings
    from fluxc.passes.insert_routers import InsertRouters
    from fluxc.passes.route_attention import RouteAttention

    @functools.cache
    def route(config: object = None) -> ExportedProgram:
        scored = InsertRouters().apply(toy(config)).program
        return RouteAttention(SparseSettings(sink=2, window=4)).apply(scored).program

    return route
