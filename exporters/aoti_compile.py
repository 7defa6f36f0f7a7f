"""Compiles the pieces of a program with AOTInductor into one package, without their weights."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.export import Dim
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule, Node

from fluxc.errors import BuilderError, InternalError, StorageError, TargetError
from fluxc.exporters.aoti_pieces import Cut

_LAST_LINES = 12
_FIRST_EXAMPLE = 3  # example of a free size: above 1, which torch would take for a constant
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


def export_piece(module: GraphModule, *, with_stand_ins: bool) -> ExportedProgram:
    """A piece as a program of its own, each free size at least 1.

    `with_stand_ins`: weights become random numbers, so that nothing of one layer's can be folded into the code that
    other layers run.
    """
    if with_stand_ins:
        module = GraphModule(_stand_ins(module), module.graph)
    sizes = _Sizes()
    vals = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    shapes = tuple(sizes.dims(val) for val in vals)
    with torch.no_grad():
        return torch.export.export(module, tuple(map(sizes.example, vals)), dynamic_shapes=shapes)


class _Sizes:
    """Numbers and torch's `Dim` for the symbols of some fake values."""

    def __init__(self) -> None:
        self._examples: dict[sympy.Symbol, int] = {}
        self._dims: dict[sympy.Symbol, Any] = {}

    def dims(self, val: Tensor) -> dict[int, Any]:
        """What `torch.export` wants to know of the free axes of an input."""
        sizes: list[Any] = list(val.shape)
        free = {axis: size.node.expr for axis, size in enumerate(sizes) if isinstance(size, torch.SymInt)}
        return {axis: self._dim(expr) for axis, expr in free.items()}

    def example(self, val: Tensor) -> Tensor:
        """A tensor of the same dtype, device and layout."""
        shape, stride = ([self._number(size) for size in sizes] for sizes in (val.shape, val.stride()))
        return torch.empty_strided(shape, stride, dtype=val.dtype, device=val.device)

    def _number(self, size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        return int(expr.subs({symbol: self._example_of(symbol) for symbol in expr.free_symbols}))

    def _example_of(self, symbol: sympy.Symbol) -> int:
        return self._examples.setdefault(symbol, _FIRST_EXAMPLE + len(self._examples))

    def _dim(self, expr: sympy.Expr) -> Any:
        if not expr.is_symbol:
            raise InternalError(f"a layer takes a value of the size {expr}, which is no free size")
        self._example_of(expr)
        return self._dims.setdefault(expr, Dim(f"size_{len(self._dims)}", min=1))


def _stand_ins(module: GraphModule) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def stand_in(value: Tensor) -> Any:
        if not value.is_floating_point():
            return value
        noise = torch.rand(value.shape, generator=generator, dtype=torch.float32).to(value.dtype).to(value.device)
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(noise)

    held = {str(node.target): getattr(module, str(node.target)) for node in module.graph.nodes if _is_held(node)}
    return {name: stand_in(value) if isinstance(value, Tensor) else value for name, value in held.items()}


def _is_held(node: Node) -> bool:
    return node.op == "get_attr"


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
