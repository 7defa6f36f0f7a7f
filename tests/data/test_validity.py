"""Where exactly a fact stops being valid: the edges of the sink and of the window."""

from __future__ import annotations

import dataclasses

from fluxc.data import TokenizedPrompt, generate, validate
from fluxc.testing import tiny_tokenizer

SINK, WINDOW = 16, 128


def made(task: str) -> TokenizedPrompt:
    return generate([task], 1, tiny_tokenizer(), [420], 0, "calibration", SINK, WINDOW)[0]


def moved(prompt: TokenizedPrompt, start: int) -> TokenizedPrompt:
    return dataclasses.replace(prompt, facts=((start, start + 10),))


def test_validate_names_the_fault() -> None:
    prompt = made("needle")
    assert prompt.question is not None
    edge = prompt.question - WINDOW - 10 + 1
    assert validate(moved(prompt, SINK), SINK, WINDOW) == ""
    assert "inside the sink" in validate(moved(prompt, SINK - 1), SINK, WINDOW)
    assert validate(moved(prompt, edge), SINK, WINDOW) == ""
    assert "inside the window" in validate(moved(prompt, edge + 1), SINK, WINDOW)
    assert "fewer than" in validate(prompt, SINK, len(prompt) // 2)
    assert "does not say" in validate(dataclasses.replace(prompt, facts=()), SINK, WINDOW)


def test_validate_of_a_local_prompt_wants_the_facts_near() -> None:
    prompt = made("local")
    edge = prompt.prompt_len - WINDOW
    assert validate(moved(prompt, edge), SINK, WINDOW) == ""
    assert "outside the window" in validate(moved(prompt, edge - 1), SINK, WINDOW)
