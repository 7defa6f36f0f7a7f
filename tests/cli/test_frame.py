"""The frame of the command line: laziness, exit codes, one-line errors, streams."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from fluxc.cli import app, main
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.errors import InternalError, SourceError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a function as the command `probe` and return exit code, stdout and stderr."""

    def call(function: Callable[[Screen], None], *argv: str) -> tuple[int, str, str]:
        probe = command("probe", examples="fluxc probe")(function)
        monkeypatch.setattr(app.LazyGroup, "get_command", lambda self, ctx, name: probe)
        code = main(["probe", *argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def raising(fault: BaseException) -> Callable[[Screen], None]:
    def probe(screen: Screen) -> None:
        raise fault

    return probe


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in app.COMMANDS)])
def test_help_loads_no_torch(argv: list[str]) -> None:
    code = f"import sys; from fluxc.cli import main; main({argv!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)


@pytest.mark.parametrize("name", app.COMMANDS)
def test_help_has_examples_and_the_common_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Examples:\n    fluxc {name}" in text
    assert all(option in text for option in ("--json", "--quiet", "--debug"))


def test_group_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in app.COMMANDS)


def test_user_error_is_one_line_and_2(run: Run) -> None:
    code, out, err = run(raising(SourceError("model.pt does not exist", hint="give a\npath")))
    assert (code, out, err) == (2, "", "error: model.pt does not exist; give a path\n")


def test_our_error_is_1(run: Run) -> None:
    assert run(raising(InternalError("a contract does not hold")))[::2] == (1, "error: a contract does not hold\n")


def test_unexpected_error_is_1_and_names_debug(run: Run) -> None:
    code, out, err = run(raising(ValueError("first\nsecond")))
    assert (code, out) == (1, "")
    assert err.startswith("error: ValueError: first.")
    assert "--debug" in err
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(run: Run) -> None:
    err = run(raising(SourceError("no")), "--debug")[2]
    assert "Traceback" in err
    assert err.endswith("error: no\n")


def test_full_disk_is_the_users(run: Run) -> None:
    code, _, err = run(raising(OSError(errno.ENOSPC, "full", "model.pt")))
    assert code == 2
    assert err == "error: model.pt: no space left on device; free some space or choose another place with -o\n"


def test_interrupt_says_what_was_kept(run: Run, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).touch()

    def probe(screen: Screen) -> None:
        screen.kept_in = tmp_path
        raise KeyboardInterrupt

    said = f"interrupted: 2 measurements are kept in {tmp_path}; the same command resumes\n"
    assert run(probe) == (130, "", said)


def test_interrupt_before_anything_was_kept(run: Run) -> None:
    assert run(raising(KeyboardInterrupt())) == (130, "", "interrupted: nothing was written\n")


def test_unknown_option_is_2(run: Run) -> None:
    code, out, err = run(lambda screen: None, "--no-such-option")
    assert (code, out) == (2, "")
    assert err.startswith("error: No such option")
    assert "`fluxc probe --help`" in err


def test_unknown_command_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-command"]) == 2
    assert "`fluxc --help`" in capsys.readouterr().err


def say(screen: Screen) -> None:
    click.echo("a library talks")
    progress = screen.progress()
    progress.start("measuring", 2)
    progress.advance()
    progress.note("noted [brackets]")
    screen.show("for [bold]people[/bold]")
    screen.answer("the answer")
    screen.result({"value": 1, "none": [float("nan")]})


def test_people_get_text_on_stdout_and_progress_on_stderr(run: Run) -> None:
    code, out, err = run(say)
    assert (code, out) == (0, "for people\nthe answer\n")
    assert err.startswith("a library talks\n  noted [brackets]\nmeasuring (")


def test_json_stands_alone_on_stdout(run: Run) -> None:
    code, out, err = run(say, "--json")
    assert (code, json.loads(out)) == (0, {"value": 1, "none": [None]})
    assert "measuring" in err


def test_quiet_leaves_the_answer(run: Run) -> None:
    assert run(say, "-q") == (0, "the answer\n", "a library talks\n")


@pytest.mark.parametrize(
    ("role", "options"), [("makes", {"force": True, "dry_run": True}), ("edits", {"dry_run": True})]
)
def test_writing_commands_can_be_tried_first(
    role: str, options: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    def probe(screen: Screen, **given: Any) -> None:
        screen.result(given)

    writer = command("probe", examples="fluxc probe", **{role: True})(probe)
    writer.main(["--json", "-n", *(["-f"] if "force" in options else [])], obj=Screen(), standalone_mode=False)
    assert json.loads(capsys.readouterr().out) == options
