"""Prompts of every kind become ids; pieces add up to the text."""

from __future__ import annotations

import pytest
import torch

from fluxc.engine.text import TextWriter, is_batch, prompt_ids
from fluxc.errors import DataError
from fluxc.testing import tiny_tokenizer

TEXT = "The snowman ☃ says: naïve 日本語 text 🙂!\n\n  indented"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_pieces_add_up_and_hold_whole_characters(tokenizer):
    writer = TextWriter(tokenizer)
    ids = tokenizer(TEXT)["input_ids"]
    pieces = [writer.add(token) for token in ids] + [writer.finish()]
    assert "".join(pieces) == writer.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 10


def test_an_unfinished_character_comes_at_the_end(tokenizer):
    writer = TextWriter(tokenizer)
    ids = tokenizer("a🙂")["input_ids"][:-1]
    assert "\ufffd" not in "".join(writer.add(token) for token in ids)
    writer.finish()
    assert writer.text == tokenizer.decode(ids)


def test_special_tokens_are_no_text(tokenizer):
    writer = TextWriter(tokenizer)
    assert [writer.add(token) for token in (0, 1)] == ["", ""]
    assert (writer.finish(), writer.text) == ("", "")


def test_no_tokenizer_no_text():
    writer = TextWriter(None)
    assert (writer.add(3), writer.finish(), writer.text) == ("", "", "")


def test_prompts(tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt_ids(tokenizer, messages) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert prompt_ids(tokenizer, "Hello") == tokenizer("Hello")["input_ids"]
    for given in ([3, 4], (3, 4), torch.tensor([3, 4]), torch.tensor([[3, 4]])):
        assert prompt_ids(None, given) == [3, 4]


@pytest.mark.parametrize("given", ["", [], torch.zeros(0, dtype=torch.int64)])
def test_an_empty_prompt_is_refused(tokenizer, given):
    with pytest.raises(DataError, match="no tokens"):
        prompt_ids(tokenizer, given)


def test_what_is_no_prompt_is_refused():
    with pytest.raises(DataError, match="no tokenizer"):
        prompt_ids(None, "text")
    with pytest.raises(DataError, match=r"no chat template\. give the prompt as a text"):
        prompt_ids(tiny_tokenizer(chat=False), [{"role": "user", "content": "Hello"}])
    with pytest.raises(DataError, match=r"holds 1\.5"):
        prompt_ids(None, [1, 1.5])


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ("text", False),
        (["a", "b"], True),
        ([1, 2], False),
        ([[1, 2], [3]], True),
        ([{"role": "user", "content": "a"}], False),
        ([[{"role": "user", "content": "a"}]], True),
        (torch.tensor([1, 2]), False),
        (torch.tensor([[1, 2]]), False),
        (torch.tensor([[1, 2], [3, 4]]), True),
        ([torch.tensor([1]), torch.tensor([2, 3])], True),
        ([], False),
    ],
)
def test_lists_of_prompts_are_told_from_prompts(given, batch):
    assert is_batch(given) == batch
