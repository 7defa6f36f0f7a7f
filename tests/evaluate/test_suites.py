"""Which suites there are, and which lengths of prompts fit a model."""

from __future__ import annotations

import pytest

from fluxc.errors import OptionError
from fluxc.evaluate.options import EvalOptions
from fluxc.evaluate.suites import SUITES, Sizes, lengths_of

SIZES = Sizes(sink=64, window=1024, context=8192)


def test_an_unknown_suite_names_those_there_are() -> None:
    with pytest.raises(OptionError, match="no suite 'poetry'") as caught:
        EvalOptions(suites=("poetry",))
    assert all(name in caught.value.hint for name in SUITES)


def test_default_lengths_are_valid_and_fit() -> None:
    for name in SUITES:
        assert all(SIZES.shortest <= length <= SIZES.context for length in lengths_of(name, SIZES))
    assert lengths_of("text", Sizes(64, 1024, 2500)) == (2500,)
    assert len(lengths_of("text", Sizes(64, 1024, 0))) == 2


def test_a_length_past_the_context_says_what_fits() -> None:
    with pytest.raises(OptionError, match="cannot have prompts of 9000 tokens") as caught:
        lengths_of("retrieval", SIZES, (4000, 9000))
    assert caught.value.hint == f"lengths that fit: {SIZES.shortest} to 8192 tokens"


def test_a_length_inside_the_window_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot have prompts of 1000 tokens"):
        lengths_of("retrieval", SIZES, (1000,))


def test_long_answers_leave_room_for_themselves() -> None:
    with pytest.raises(OptionError, match="8000 tokens"):
        lengths_of("long-answer", SIZES, (8000,))


def test_a_context_without_room() -> None:
    with pytest.raises(OptionError, match="has room for 2000") as caught:
        lengths_of("retrieval", Sizes(64, 1024, 2000))
    assert "no length fits" in caught.value.hint


@pytest.mark.parametrize("wrong", [{"oracle": "magic"}, {"count": 0}, {"part": (3, 2)}])
def test_options_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        EvalOptions(**wrong)  # type: ignore[arg-type]
