"""Progress without a terminal: lines, not bars."""

from __future__ import annotations

import pytest

from fluxc.cli import bars


def test_a_line_for_each_finished_stage(capsys: pytest.CaptureFixture[str]) -> None:
    shown = bars.Bars()
    shown.start("measuring", 2)
    shown.advance()
    shown.start("fitting")
    shown.note("the noted thing")
    shown.stop()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["measuring", "  the noted thing", "fitting"]


def test_a_long_stage_says_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 50.0, 61.0, 61.0, 70.0, 130.0, 130.0, 140.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(clock))
    shown = bars.Bars()
    shown.start("measuring", 9)
    for _ in range(4):
        shown.advance()
    shown.stop()
    lines = capsys.readouterr().err.splitlines()
    said = ["measuring: 2 of 9 (61 s, about 214 s left)", "measuring: 4 of 9 (130 s, about 162 s left)"]
    assert lines == [*said, "measuring (140.0 s)"]
