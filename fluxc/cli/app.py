"""The command group, and the one place where errors become a line of text and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import click

from fluxc import __version__
from fluxc.cli.command import CONTEXT, InterruptedRunError
from fluxc.cli.screen import Screen
from fluxc.errors import FluxcError, StorageError

# Module of each command, in the order of the help text. Each holds a click command of the same name.
COMMANDS = {
    "doctor": "fluxc.cli.doctor",
    "capture": "fluxc.cli.capture",
    "inspect": "fluxc.cli.inspect",
    "transform": "fluxc.cli.transform",
    "calibrate": "fluxc.cli.calibrate",
    "train": "fluxc.cli.train",
    "export": "fluxc.cli.export",
    "run": "fluxc.cli.run",
    "eval": "fluxc.cli.eval",
    "report": "fluxc.cli.report",
    "bench": "fluxc.cli.bench",
    "serve": "fluxc.cli.serve",
}

INTERRUPTED = 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used, so that `fluxc --help` stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in help order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, None where there is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=LazyGroup, context_settings=CONTEXT, invoke_without_command=True, no_args_is_help=False)
@click.version_option(__version__, prog_name="fluxc")
@click.pass_context
def group(ctx: click.Context) -> None:
    """fluxc puts a Layer Router in front of every attention of a frozen language model.

    \b
    Start here:
      fluxc doctor                            what this machine can run
      fluxc transform MODEL --budget 0.4      a model in, a calibrated routed model out
      fluxc run model.flux --prompt TEXT      its routes, times and answer
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(argv: Sequence[str] | None = None, command: click.Command = group, name: str = "fluxc") -> int:
    """Run a command line (`fluxc`, or another command of this frame) and return its exit code; see `fluxc.cli.main`."""
    screen = Screen()
    try:
        with _quiet_libraries():
            code = command.main(args=argv, prog_name=name, standalone_mode=False, obj=screen)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort, InterruptedRunError):
        screen.interrupted()
        return INTERRUPTED
    except Exception as fault:
        return _report(fault, screen)
    finally:
        screen.close()


def _report(fault: Exception, screen: Screen) -> int:
    """Print the fault as one line, with the traceback under `--debug`, and return its exit code."""
    if screen.debug:
        traceback.print_exception(fault)
    if isinstance(fault, BrokenPipeError):
        return _reader_gone()
    if isinstance(fault, click.ClickException):
        screen.error(_usage_text(fault))
        return 2
    known = _storage_fault(fault)
    if isinstance(known, FluxcError):
        kept = screen.kept() if isinstance(known, StorageError) else ""
        screen.error("; ".join(part for part in (known.message.rstrip("."), known.hint, kept) if part))
        return known.exit_code
    text = next(iter(str(fault).strip().splitlines()), "")
    screen.error(f"{type(fault).__name__}: {text}. This is a fault in fluxc; `--debug` shows the traceback")
    return 1


def _reader_gone() -> int:
    """`fluxc ... | head` closed our stdout: point it elsewhere, or Python complains once more on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _usage_text(fault: click.ClickException) -> str:
    text = fault.format_message().removesuffix(".")
    context = getattr(fault, "ctx", None)
    return f"{text}; `{context.command_path} --help` shows how it is used" if context else text


def _storage_fault(fault: Exception) -> Exception:
    """A full or read-only disk is the user's to mend, wherever the write failed."""
    if isinstance(fault, OSError) and fault.errno in UNWRITABLE:
        reason = os.strerror(fault.errno).lower()
        text = f"{fault.filename}: {reason}" if fault.filename else reason
        return StorageError(text, hint="free some space or choose another place with -o")
    return fault


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep other libraries' warnings and progress bars off the screen; fluxc itself says what matters."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
