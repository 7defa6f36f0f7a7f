"""Tasks of evaluation alone: valid, answerable from their facts, and never part of a calibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fluxc.data import FAR, HELDOUT, REASONING, TASKS, TokenizedPrompt, generate, group_of, validate
from fluxc.data.folder import FolderTexts
from fluxc.data.validity import FACTS_FAR
from fluxc.errors import DataError
from fluxc.testing import tiny_tokenizer

SINK, WINDOW, LENGTH = 4, 64, 900


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def make(tokenizer: Any, task: str, count: int = 6, **changes: Any) -> list[TokenizedPrompt]:
    return generate([task], count, tokenizer, [LENGTH], 0, HELDOUT, SINK, changes.pop("window", WINDOW), **changes)


def facts(prompt: TokenizedPrompt) -> str:
    assert prompt.prompt is not None
    return " ".join(prompt.prompt.text[a:b] for a, b in prompt.prompt.facts)


def answer(prompt: TokenizedPrompt) -> str:
    assert prompt.prompt is not None
    return prompt.prompt.answer


@pytest.mark.parametrize("task", [*FAR, "far-sum"])
def test_far_tasks_are_valid_and_their_facts_hold_the_answer(task: str, tokenizer: Any) -> None:
    for prompt in make(tokenizer, task):
        assert validate(prompt, SINK, WINDOW) == ""
        words = [word.strip(",") for word in answer(prompt).split() if word not in ("and", "+", "=")]
        asked = words[:2] if task == "far-sum" else words
        assert all(word in facts(prompt) for word in asked)


def test_the_asked_words_are_the_most_common_ones(tokenizer: Any) -> None:
    for prompt in make(tokenizer, "common-words"):
        words = facts(prompt).replace("Word list:", "").replace(".", ",").split(",")
        counted = sorted({word.strip() for word in words if word.strip()}, key=lambda w: -facts(prompt).count(w))
        assert answer(prompt) == f" {counted[0]} and {counted[1]}"


def test_values_are_asked_in_the_order_of_the_text(tokenizer: Any) -> None:
    for prompt in make(tokenizer, "multi-value"):
        values = answer(prompt).strip().split(", ")
        assert sorted(values, key=facts(prompt).index) == values


@pytest.mark.parametrize("task", REASONING)
def test_sums_are_right(task: str, tokenizer: Any) -> None:
    for prompt in make(tokenizer, task, window=256 if task == "steps" else WINDOW):
        for part in answer(prompt).split(","):
            left, right = part.split("=")
            assert eval(left) == int(right)


def test_calibration_does_not_draw_from_them() -> None:
    assert not set(TASKS) & {*FAR, *REASONING}
    assert {group_of(task) for task in FAR} == {"retrieval"}
    assert {group_of(task) for task in REASONING} == {"reasoning"}


@pytest.mark.parametrize("task", FACTS_FAR)
def test_a_fact_inside_the_window_is_refused(task: str, tokenizer: Any) -> None:
    prompt = make(tokenizer, task, count=1)[0]
    last = max(b for _, b in prompt.facts) - 1
    near, far = (dataclasses.replace(prompt, question=last + distance) for distance in (WINDOW - 1, WINDOW))
    assert "inside the window" in validate(near, SINK, WINDOW)
    assert validate(far, SINK, WINDOW) == ""


def test_texts_of_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.txt").write_text("\n\n".join(f"Own sentence number {i} stands here." for i in range(900)))
    (tmp_path / "code.py").write_text("\n\n".join(f"def own_{i}(): return {i}" for i in range(900)))
    texts = FolderTexts(tmp_path)
    prompt = make(tokenizer, "needle", count=1, texts=texts)[0]
    assert prompt.prompt is not None and "Own sentence number" in prompt.prompt.text
    assert "def own_" in make(tokenizer, "code", 1, texts=texts)[0].prompt.text  # type: ignore[union-attr]
    before = texts.hash()
    (tmp_path / "code.py").write_text("x = 1")
    assert FolderTexts(tmp_path).hash() != before
    with pytest.raises(DataError, match="the code of the corpus is shorter than"):
        make(tokenizer, "code", 1, texts=FolderTexts(tmp_path))
    (tmp_path / "code.py").unlink()
    with pytest.raises(DataError, match="the corpus holds no code"):
        make(tokenizer, "code", 1, texts=FolderTexts(tmp_path))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        FolderTexts(tmp_path / "none")
    with pytest.raises(DataError, match="holds no text files"):
        FolderTexts(tmp_path)
