"""Where the template, the facts and the answer end up among the tokens."""

from __future__ import annotations

from typing import Any

import pytest

from fluxc.data import Prompt, tokenize
from fluxc.errors import DataError
from fluxc.testing import tiny_tokenizer

TEXT = "The lamp is at the door. A cat sleeps below it. Where is the lamp?"
FACT = (0, TEXT.index(".") + 1)
PROMPT = Prompt("t", TEXT, " at the door", True, "The lamp is", (FACT,), TEXT.index("Where"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.mark.parametrize("chat", [True, False])
def test_spans_cover_their_text(tokenizer: Any, chat: bool) -> None:
    built = tokenize(PROMPT, tokenizer, chat)
    (start, end), ids = built.facts[0], built.input_ids
    assert tokenizer.decode(ids[start:end]) == "The lamp is at the door."
    assert tokenizer.decode(ids[built.question : built.question + 1]).strip()[:1] == "W"  # type: ignore[operator]
    assert tokenizer.decode(built.answer_ids) == " at the door"
    assert tokenizer.decode(ids[: built.prompt_len]).endswith("The lamp is")


def test_prefix_opens_the_assistants_turn(tokenizer: Any) -> None:
    assert tokenizer.decode(tokenize(PROMPT, tokenizer).input_ids).endswith("[assistant]\nThe lamp is at the door")
    assert tokenizer.decode(tokenize(PROMPT, tokenizer, chat=False).input_ids).endswith(
        "the lamp?\nThe lamp is at the door"
    )


def test_a_template_that_strips_the_message_moves_no_fact(tokenizer: Any) -> None:
    shift = 3
    padded = Prompt("t", "\n" * shift + TEXT + "  ", " x", True, "", ((FACT[0] + shift, FACT[1] + shift),))
    built = tokenize(padded, tokenizer)
    (start, end) = built.facts[0]
    assert tokenizer.decode(built.input_ids[start:end]) == "The lamp is at the door."


def test_a_template_that_rewrites_the_message_is_refused(tokenizer: Any) -> None:
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("| trim", "| upper")
    with pytest.raises(DataError, match="rewrites"):
        tokenize(PROMPT, other)


def test_an_answer_that_merges_with_the_prompt_is_scored_whole(tokenizer: Any) -> None:
    merged = tokenize(Prompt("t", "Where is the la", "mp of the door"), tokenizer)
    assert tokenizer.decode(merged.answer_ids).endswith("mp of the door")
    assert tokenizer.decode(merged.input_ids) == "Where is the lamp of the door"


def test_a_beginning_of_sequence_token_is_added_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    other = tiny_tokenizer()
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    plain, with_bos = tokenize(PROMPT, tokenizer, chat=False), tokenize(PROMPT, other, chat=False)
    assert with_bos.input_ids == [0, *plain.input_ids]
    assert (with_bos.prompt_len, with_bos.question) == (plain.prompt_len + 1, (plain.question or 0) + 1)
    assert with_bos.facts[0] == (plain.facts[0][0] + 1, plain.facts[0][1] + 1)
    assert tokenize(PROMPT, other).input_ids == tokenize(PROMPT, tokenizer).input_ids


def test_characters_of_several_bytes_keep_their_place(tokenizer: Any) -> None:
    text = "é日本語 the lamp. " + TEXT
    start = text.index("The lamp")
    built = tokenize(Prompt("t", text, " x", facts=((start, start + 8),)), tokenizer)
    (a, b) = built.facts[0]
    assert tokenizer.decode(built.input_ids[a:b]).strip() == "The lamp"


def test_without_answer_the_end_of_the_text_is_scored(tokenizer: Any) -> None:
    built = tokenize(Prompt("prose", TEXT, scored=5), tokenizer)
    assert built.answer_len == 5
    assert tokenize(Prompt("prose", TEXT, scored=10_000), tokenizer).answer_len == len(built) // 2


def test_an_empty_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no tokens before its answer"):
        tokenize(Prompt("t", "", "answer"), tokenizer)
