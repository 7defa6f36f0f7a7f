"""The wheel is whole: an editable install cannot show a package or a data file that the wheel lacks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

CHECK = """
import importlib, sys
site, *packages = sys.argv[1:]
for name in packages:
    module = importlib.import_module(name)
    assert module.__file__.startswith(site), (name, module.__file__)
from fluxc.data import corpus
print(sum(len(corpus.read(piece)) for piece in corpus.pieces()), corpus.hash())
"""


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of the tracked files installed, without its dependencies."""
    base = tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            (base / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, base / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", base, base / "source")
    run(*pip, "install", "--no-deps", "--target", base / "site", next(base.glob("fluxc-*.whl")))
    return base / "site"


@pytest.mark.slow
def test_every_package_imports_and_the_corpus_is_there(site: Path) -> None:
    from fluxc.data import corpus

    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    shown = run(sys.executable, "-P", "-c", CHECK, site, *PACKAGES, env=environment, cwd=site.parent)
    characters, digest = shown.split()
    assert int(characters) > 2_000_000
    assert digest == corpus.hash()


@pytest.mark.slow
def test_every_module_is_in_the_wheel(site: Path) -> None:
    tracked = [
        name for name in run("git", "ls-files", "*.py", cwd=ROOT).split() if not name.startswith(("tests/", "bench/"))
    ]
    expected = {name if name.startswith("fluxc/") else f"fluxc/{name}" for name in tracked if (ROOT / name).exists()}
    installed = {str(path.relative_to(site)) for path in (site / "fluxc").rglob("*.py")}
    assert expected == installed


@pytest.mark.slow
def test_the_command_is_installed(site: Path) -> None:
    assert (site / "bin" / "fluxc").exists()
