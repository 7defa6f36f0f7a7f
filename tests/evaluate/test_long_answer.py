"""Long answers: what their scores mean, and that the engine writes them under the routes of the prompt."""

from __future__ import annotations

import pytest

from fluxc.bench.systems import controls
from fluxc.data import HELDOUT, generate
from fluxc.evaluate.long_answer import LongAnswers, agreement, fresh
from fluxc.evaluate.scorer import Scorer
from fluxc.evaluate.store import Store
from fluxc.evaluate.subjects import FluxSubject


def test_agreement_ends_at_the_first_other_token() -> None:
    assert agreement([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert agreement([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0


def test_fresh_is_low_for_a_loop() -> None:
    assert fresh([1, 2, 3, 4, 5, 6]) == 1.0
    assert fresh([1, 2] * 50) == pytest.approx(2 / 97)
    assert fresh([1]) == 1.0


def test_answers_of_an_engine(subject: FluxSubject) -> None:
    prompt = generate(["prose"], 1, subject.tokenizer, [300], 0, HELDOUT, 4, 96)[0]
    store = Store(None, subject.digest)
    answers = LongAnswers(subject, Scorer(subject, store), store, tokens=6)
    dense, _, _, sparse, kept = answers.rows(prompt, controls(2), lambda: None)
    assert (dense["agree"], dense["answer_tokens"]) == (1.0, 6)
    assert (sparse["decode"], kept["decode"]) == ("sparse", "full")
    assert sparse["kv_bytes"] < kept["kv_bytes"] == dense["kv_bytes"]
    assert (sparse["routes"], dense["routes"]) == ("00", "11")
    assert answers.rows(prompt, controls(2), lambda: None)[3] == sparse
