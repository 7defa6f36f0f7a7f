"""The user's prompts: what is read, and that each bad line is named with its number and the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fluxc.data import read_jsonl, tokenize_jsonl
from fluxc.errors import DataError
from fluxc.testing import tiny_tokenizer

GOOD = '{"prompt": "How many legs has a spider?", "answer": "Eight", "task": "quiz"}'
TEXT = '{"prompt": "The quick brown fox jumps over the lazy dog and runs away."}'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(folder: Path, *lines: str) -> Path:
    path = folder / "mix.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_reads_prompts_in_order(tmp_path: Path) -> None:
    first, second = read_jsonl(write(tmp_path, GOOD, "", TEXT, ""))
    assert (first.task, first.text, first.answer, first.chat) == ("quiz", "How many legs has a spider?", "Eight", True)
    assert (second.task, second.answer, second.chat) == ("user", "", False)


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    assert read_jsonl(write(tmp_path, '{"prompt": "one\u2028two"}'))[0].text == "one\u2028two"


def test_null_counts_as_left_out(tmp_path: Path) -> None:
    (prompt,) = read_jsonl(write(tmp_path, '{"prompt": "x y", "answer": null, "task": null}'))
    assert (prompt.task, prompt.answer) == ("user", "")


def test_the_answer_is_scored(tmp_path: Path, tokenizer: Any) -> None:
    asked, text = tokenize_jsonl(write(tmp_path, GOOD, TEXT), tokenizer, context=200)
    assert tokenizer.decode(asked.answer_ids) == "Eight"
    assert tokenizer.decode(asked.input_ids[: asked.prompt_len]).endswith("spider?</s>\n[assistant]\n")
    assert text.answer_len == len(text) // 2
    assert asked.asks and not text.asks


BAD = {
    "bad JSON": ('{"prompt": "a"', "line 2: not valid JSON"),
    "a list": ("[1]", "line 2: a JSON list, not an object"),
    "unknown key": ('{"prompt": "a", "answr": "b"}', "line 2: unknown key 'answr'"),
    "no prompt": ('{"answer": "b"}', "line 2: the key 'prompt' is missing"),
    "empty prompt": ('{"prompt": "  "}', "line 2: the prompt is empty"),
    "number": ('{"prompt": 3}', "line 2: 'prompt' is not a string"),
    "null prompt": ('{"prompt": null}', "line 2: 'prompt' is not a string"),
    "number as answer": ('{"prompt": "a", "answer": 3}', "line 2: 'answer' is not a string"),
    "nested too deep": ("[" * 100_000, "line 2: not valid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_named(tmp_path: Path, case: str) -> None:
    line, message = BAD[case]
    with pytest.raises(DataError, match=r"mix\.jsonl, " + message.replace("(", r"\(")) as caught:
        read_jsonl(write(tmp_path, GOOD, line))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="holds no prompts"):
        read_jsonl(write(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mix.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_jsonl(path)


def test_a_prompt_longer_than_the_context_is_named(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, GOOD, '{"prompt": "' + "word " * 200 + '"}')
    length = len(tokenize_jsonl(path, tokenizer, context=10_000)[1])
    with pytest.raises(DataError, match=rf"line 2: the prompt and its answer have {length} tokens.*{length - 1}"):
        tokenize_jsonl(path, tokenizer, context=length - 1)
    assert len(tokenize_jsonl(path, tokenizer, context=length)) == 2
