"""Small parts alone: stop strings, the gate, keys, nesting, logs, the pace of tokens."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxc.errors import OptionError
from fluxc.serve.body import check_depth
from fluxc.serve.errors import ApiError
from fluxc.serve.gate import Gate
from fluxc.serve.keys import ApiKeys
from fluxc.serve.logs import FIELDS, JsonLines
from fluxc.serve.metrics import PACE_SECONDS, Pace
from fluxc.serve.stops import StopWatch


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string_and_nothing_of_it_gets_out(pieces, stops):
    watch = StopWatch(stops)
    given_out = [watch.add(piece) for piece in pieces]
    whole = "".join(pieces)
    text = "".join(given_out) + watch.rest()
    assert watch.hit == any(stop in whole for stop in stops)
    assert whole.startswith(text) and not any(stop in text for stop in stops)
    if not watch.hit:
        assert text == whole


def test_a_stop_string_split_over_pieces_is_held_back():
    watch = StopWatch(["END", "no"])
    assert [watch.add(piece) for piece in ("one E", "N", "O E", "ND two")] == ["one ", "", "ENO ", ""]
    assert watch.hit and watch.rest() == "" and watch.add("more") == ""


def test_the_gate_counts_answers_and_says_when_to_come_back():
    gate = Gate(capacity=6, batch=2)
    with gate.room(6):
        gate.took(21.0)
        with pytest.raises(ApiError) as full, gate.room(1):
            pass
        # 4 wait, 2 at a time, and the last one took longer than those before.
        assert full.value.status == 429 and full.value.retry_after == 6
    assert gate.inside == 0
    with pytest.raises(ApiError) as never, gate.room(7):
        pass
    assert never.value.status == 400
    gate.draining = True
    with pytest.raises(ApiError) as gone, gate.room(1):
        pass
    assert gone.value.status == 503


def test_keys_are_kept_as_digests(tmp_path):
    keys = ApiKeys.of(["right", "other"])
    assert b"right" not in b"".join(keys.digests)
    assert keys.admits("Bearer right") and keys.admits("bearer other")
    assert not any(keys.admits(text) for text in ("Bearer wrong", "right", "Basic right", "", "Bearer "))
    assert ApiKeys().admits("")
    (tmp_path / "none").write_text("# nothing\n\n")
    with pytest.raises(OptionError, match="holds no key"):
        ApiKeys.read(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "body, deep", [(b"[[[1]]]", 3), (b'{"a": [{"b": "[[[[" }]}', 3), (b'"\\"[[["', 0), (b"]]][[", 0)]
)
def test_nesting_is_counted_outside_of_strings(body, deep):
    check_depth(body, max(deep, 1))
    if deep:
        with pytest.raises(ApiError):
            check_depth(body, deep - 1)


def test_a_log_line_is_json_with_its_fields_and_traceback():
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    setattr(record, FIELDS, {"tokens": 3})
    found = json.loads(JsonLines().format(record))
    assert (found["event"], found["level"], found["tokens"]) == ("failed", "error", 3)
    assert "ValueError: why" in found["traceback"]


def test_the_pace_is_a_mean_of_the_last_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace()
    for _ in range(30):
        pace.add()
        now[0] += 0.1
    assert pace.per_second() == pytest.approx(30 / PACE_SECONDS)
    now[0] += PACE_SECONDS + 3
    assert pace.per_second() == 0
