"""Builds the C++ side of AOTI engines: `python -m fluxc.exporters.cpp_build [FOLDER]`.

`libfluxc_ops.so` holds fluxc's ops for the CPU, `fluxc-aoti` is a program that runs an engine without Python.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fluxc.errors import BuilderError
from fluxc.exporters.aoti import compiler
from fluxc.exporters.aoti_compile import no_compiler

SOURCES = Path(__file__).parent / "cpp"
OPS, PROGRAM = "libfluxc_ops.so", "fluxc-aoti"
_LAST_LINES = 5


def build(folder: Path) -> Path:
    """Compile both into `folder`; returns the program. Raises TargetError without a compiler, BuilderError if it fails.

    They run with the torch they were built with, from where it is installed now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    includes = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
    common = ["-O2", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *includes]
    libraries = [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{home / 'lib'}"]
    _call([*common, "-fPIC", "-shared", str(SOURCES / "ops.cpp"), "-o", str(folder / OPS), *libraries])
    # Nothing in the program names a symbol of the ops: the linker must be told to keep them.
    ops = ["-Wl,--no-as-needed", str(folder / OPS), "-Wl,--as-needed", "-Wl,-rpath,$ORIGIN"]
    _call([*common, str(SOURCES / "run.cpp"), "-o", str(folder / PROGRAM), *ops, *libraries])
    return folder / PROGRAM


def _call(arguments: list[str]) -> None:
    name = compiler()
    if name is None:
        raise no_compiler()
    done = subprocess.run([name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = " | ".join(done.stderr.splitlines()[-_LAST_LINES:])
        raise BuilderError(f"{name} failed; its last lines: {lines}")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/cpp"))
