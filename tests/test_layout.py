"""The rooms of the tree: every file where a newcomer would look for it, and nothing that ties it to one machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
MAPPED = {"passes": "fluxc.passes", "kernels": "fluxc.kernels", "exporters": "fluxc.exporters"}
# Spelled in pieces, so that this file does not find itself.
MACHINE_PATHS = ["/" + name + "/" for name in ("work", "root", "home")] + [
    "/opt/" + name for name in ("venv", "wheels")
]
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"), ("npmjs", "org"))
]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def python_files() -> list[str]:
    return [name for name in tracked() if name.endswith(".py")]


def package_folders() -> dict[str, str]:
    """Package name of every folder with Python files in it, by the folder's path."""
    folders = {}
    for name in python_files():
        top, *rest = Path(name).parent.parts or ("",)
        if top in ("fluxc", *MAPPED):
            folders["/".join((top, *rest))] = ".".join((MAPPED.get(top, top), *rest))
    return folders


def stems(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


def test_packages_are_the_folders() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders().values())


def test_mapped_packages_have_their_folder() -> None:
    expected = {name: folder for folder, name in package_folders().items() if not folder.startswith("fluxc")}
    assert SETUPTOOLS["package-dir"] == expected


def test_every_package_has_an_init() -> None:
    assert [folder for folder in package_folders() if not (ROOT / folder / "__init__.py").exists()] == []


def test_every_pass_has_its_test() -> None:
    assert [stem for stem in stems("passes") if not (ROOT / f"tests/passes/test_{stem}.py").exists()] == []


def test_every_golden_belongs_to_a_pass() -> None:
    goldens = {path.name for path in (ROOT / "tests/passes").glob("golden/*") if path.is_dir()}
    assert goldens <= stems("passes")


def op_folders() -> list[str]:
    return [
        folder for folder in package_folders() if re.fullmatch(r"kernels/\w+", folder) and folder != "kernels/bench"
    ]


@pytest.mark.parametrize("folder", op_folders())
def test_every_op_has_its_files(folder: str) -> None:
    assert {"op", "reference"} <= stems(folder)
    assert (ROOT / f"tests/kernels/test_{Path(folder).name}.py").exists()


def test_ops_are_the_folders() -> None:
    from fluxc.kernels import registry

    assert sorted(registry.OPS) == sorted(Path(folder).name for folder in op_folders())


def test_no_file_has_two_jobs() -> None:
    ours = [name for name in python_files() if not name.startswith("tests/")]
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in ours}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_nothing_names_a_machine_or_a_registry() -> None:
    forbidden = re.compile("|".join(map(re.escape, MACHINE_PATHS + REGISTRY_HOSTS)))
    assert [name for name in texts() if forbidden.search((ROOT / name).read_text())] == []


def texts() -> list[str]:
    """Tracked text files of our own; the corpus is other people's text."""
    binary = (".pt2", ".pt", ".png", ".safetensors")
    return [name for name in tracked() if not name.startswith("fluxc/data/corpus/") and not name.endswith(binary)]


def test_checkout_does_not_hide_huggingface_kernels() -> None:
    spec = importlib.util.find_spec("kernels")
    assert spec is None or ROOT not in Path(str(spec.origin)).parents


@pytest.mark.parametrize("launcher", [["-m", "pytest"], ["-P", "-m", "pytest"]])
def test_pytest_from_the_root_does_not_either(launcher: list[str]) -> None:
    inner = "tests/test_layout.py::test_checkout_does_not_hide_huggingface_kernels"
    command = [sys.executable, *launcher, "-q", "-p", "no:cacheprovider", inner]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_python_m_from_the_root_does_not_either() -> None:
    code = "import sys, runpy; sys.argv = ['fluxc', '--version']\n"
    code += "try:\n runpy.run_module('fluxc', run_name='__main__', alter_sys=True)\nexcept SystemExit: pass\n"
    code += "import importlib.util; print(importlib.util.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert str(ROOT) not in done.stdout.splitlines()[-1]
