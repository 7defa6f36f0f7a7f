"""Compiles the pieces of a program with AOTInductor into one package, without their weights."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.export.exported_program import ExportedProgram

from fluxc.errors import BuilderError, InternalError, StorageError, TargetError
from fluxc.exporters.aoti_pieces import Cut
from fluxc.exporters.piece_programs import export_piece

_LAST_LINES = 12
_UP_TO_OOM = ("Killed signal", "Segmentation fault", "internal compiler error", "out of memory")
OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # weights stay in the engine's safetensors
    "always_keep_tensor_constants": True,  # a small weight of one layer must not become a literal of all
    "aot_inductor.enable_line_tables": False,  # 1.6 MB of file names a piece become 0.4
    "cpp.dynamic_threads": True,  # as many threads as the process has, not as this one has
}


def compile_cut(made: Cut, package: Path, done: Callable[[], None] = lambda: None) -> None:
    """Compile each piece and write `package`; `done` is called after each.

    Raises TargetError without a C++ compiler, BuilderError with the last lines of a compiler that failed, StorageError
    where the disk was full.
    """
    files: dict[str, list[Any]] = {}
    with _scratch() as folder, builder_errors(package):
        for name, module in made.modules.items():
            program = export_piece(module, with_stand_ins=name in made.shared)
            files[name] = _compile(program, folder / name)
            done()
        _package(files, package)


def _compile(program: ExportedProgram, folder: Path) -> list[Any]:
    from torch._inductor import aot_compile

    args, _ = program.example_inputs or ((), {})
    options = OPTIONS | {"aot_inductor.output_path": str(folder)}
    made = aot_compile(program.module(check_guards=False), args, options=options)
    if not isinstance(made, list):
        raise InternalError(f"torch made no list of files but {type(made).__name__}")
    return made


def _package(files: Mapping[str, list[Any]], package: Path) -> None:
    from torch._inductor.package.package import package_aoti

    package_aoti(str(package), dict(files))


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what the compiler leaves; it is gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="fluxc-aoti-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def builder_errors(package: Path) -> Iterator[None]:
    """Turn what torch raises when its compiler fails into one line that says what the compiler said last."""
    try:
        yield
    except Exception as error:
        found = _caused_by(error)
        if found is None:
            raise
        raise _translated(found, package) from error


def _caused_by(error: BaseException | None) -> BaseException | None:
    """The failure of the compiler behind an error of torch."""
    while error is not None:
        if isinstance(error, (CppCompileError, InvalidCxxCompiler)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _translated(error: BaseException, package: Path) -> Exception:
    text = str(error)
    if isinstance(error, InvalidCxxCompiler):
        return no_compiler()
    if "No space left on device" in text or "Disk quota exceeded" in text:
        reason = OSError(errno.ENOSPC, "").strerror or "the disk is full"
        return StorageError(f"cannot write {package}: the C++ compiler ran out of space ({reason})", hint="free some")
    lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    killed = any(word in text for word in _UP_TO_OOM)
    hint = "it may have run out of memory" if killed else "`--debug` shows all it said"
    return BuilderError("the C++ compiler failed; its last lines: " + " | ".join(lines), hint=hint)


def no_compiler() -> TargetError:
    """The refusal of a machine without a C++ compiler."""
    return TargetError("target aoti needs a C++ compiler, and there is none", hint="install g++, or name one in CXX")
