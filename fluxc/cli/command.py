"""What all commands share: the options every command has, and how its help is laid out."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from fluxc.cli.screen import Screen

_FORCE = click.option("-f", "--force", is_flag=True, help="Replace the output if it exists.")
_DRY_RUN = click.option(
    "-n", "--dry-run", is_flag=True, help="Check the input and say what would be done; write nothing."
)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def command(
    name: str, *, examples: str, makes: bool = False, edits: bool = False
) -> Callable[[Callable[..., None]], click.Command]:
    """Make a click command of a function that takes a Screen and the options.

    Adds `--json`, `--quiet` and `--debug`; `--dry-run` for a command that makes an output or edits one in place, and
    `--force` for one that makes an output. While the function runs, whatever libraries print on stdout goes to stderr:
    stdout holds the result alone.
    """

    def wrap(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def body(**options: Any) -> None:
            screen = click.get_current_context().find_object(Screen) or Screen()
            with contextlib.redirect_stdout(sys.stderr), _interruptible():
                function(screen, **options)

        _append_options(body, [*([_FORCE] if makes else []), *([_DRY_RUN] if makes or edits else []), *_common()])
        return click.command(name, epilog=_examples(examples), context_settings=CONTEXT)(body)

    return wrap


def _append_options(body: Any, options: list[Callable[..., Any]]) -> None:
    """Put `options` after the command's own in the help text; click keeps them in reverse."""
    own = list(getattr(body, "__click_params__", []))
    body.__click_params__ = []
    for option in reversed(options):
        option(body)
    body.__click_params__ += own


class InterruptedRunError(Exception):
    """Ctrl-C inside a command. Of its own type because click prints an empty line for a KeyboardInterrupt."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as cause:
        raise InterruptedRunError from cause


def _common() -> list[Callable[..., Any]]:
    return [
        _flag("json", "--json", help="Print the result as one JSON object on stdout, and nothing else there."),
        _flag("quiet", "-q", "--quiet", help="No progress and no report."),
        _flag("debug", "--debug", help="Show the traceback of an error."),
    ]


def _flag(attribute: str, *names: str, help: str) -> Callable[..., Any]:
    """An option that sets an attribute of the Screen instead of reaching the command."""

    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        screen = ctx.find_object(Screen)
        if screen and value:
            setattr(screen, attribute, True)

    return click.option(*names, is_flag=True, expose_value=False, is_eager=True, callback=note, help=help)


def _examples(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
