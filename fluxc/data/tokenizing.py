"""From a Prompt to token ids, keeping track of where the facts, the question and the answer went."""

from __future__ import annotations

import bisect
from typing import Any, NamedTuple

from fluxc.data.prompt import Prompt, Span, TokenizedPrompt
from fluxc.errors import DataError

MARK = "@@message@@"
"""Stands in for the message to find where a chat template puts it."""


class Encoding(NamedTuple):
    """Token ids, and for each token the index of its first character (non-decreasing)."""

    ids: list[int]
    starts: list[int]

    def token_at(self, char: int) -> int:
        """Index of the token that holds this character, or of the first of several that share it."""
        position = bisect.bisect_right(self.starts, char) - 1
        return bisect.bisect_left(self.starts, self.starts[max(position, 0)])

    def span(self, chars: Span) -> Span:
        """The tokens that hold these characters."""
        return self.token_at(chars[0]), bisect.bisect_left(self.starts, chars[1])


def encode(text: str, tokenizer: Any) -> Encoding:
    """Token ids of `text` without special tokens. Raises DataError for a tokenizer that cannot map tokens to text."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"tokenizer {type(tokenizer).__name__} does not report where its tokens stand in the text",
            hint="use the model's fast tokenizer (a folder with tokenizer.json)",
        )
    # verbose=False: a haystack longer than the model's context is cut before the model sees it.
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return Encoding(out["input_ids"], [start for start, _ in out["offset_mapping"]])


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can wrap a user's message the way the model was trained on."""
    return bool(getattr(tokenizer, "chat_template", None))


def tokenize(prompt: Prompt, tokenizer: Any, chat: bool = True) -> TokenizedPrompt:
    """Tokenize a prompt and its answer in one piece, so that the boundary is where generation would put it.

    The chat template is used when the prompt asks for it, `chat` is true and the tokenizer has one.
    A token that holds the end of the prompt and the start of the answer counts as answer.
    Raises DataError when no token is left to condition on, or when the template rewrites the user's text.
    """
    wrap = chat and prompt.chat and has_chat_template(tokenizer)
    given, shift = _wrapped(prompt, tokenizer) if wrap else (_plain(prompt), 0)
    encoding = encode(given + prompt.answer, tokenizer)
    # A chat template writes its own beginning-of-sequence token.
    bos = [] if wrap else _bos(tokenizer)
    ids = bos + encoding.ids
    prompt_len = _prompt_len(prompt, encoding, len(given)) + len(bos)
    if prompt_len < 1:
        raise DataError(f"a {prompt.task} prompt has no tokens before its answer", hint="give a longer prompt")
    return TokenizedPrompt(
        input_ids=ids,
        prompt_len=prompt_len,
        task=prompt.task,
        facts=tuple(_shifted(encoding.span((a + shift, b + shift)), len(bos)) for a, b in prompt.facts),
        question=None if prompt.question is None else encoding.token_at(prompt.question + shift) + len(bos),
        prompt=prompt,
    )


def _plain(prompt: Prompt) -> str:
    return f"{prompt.text}\n{prompt.prefix}" if prompt.prefix else prompt.text


def _wrapped(prompt: Prompt, tokenizer: Any) -> tuple[str, int]:
    """The text inside the chat template with the answer's prefix behind it, and where the text starts."""
    given, start = _render(prompt.text, tokenizer), _render(MARK, tokenizer).find(MARK)
    # Many templates strip the message; its facts are counted from where the unstripped text would start.
    if given.startswith(prompt.text, start):
        return given + prompt.prefix, start
    if given.startswith(prompt.text.strip(), start):
        return given + prompt.prefix, start - (len(prompt.text) - len(prompt.text.lstrip()))
    raise DataError("the chat template rewrites the text of the prompt", hint="calibrate without the chat template")


def _render(text: str, tokenizer: Any) -> str:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _prompt_len(prompt: Prompt, encoding: Encoding, given: int) -> int:
    if prompt.answer:
        return encoding.token_at(given)
    # At least half stays prompt: the router pools the prompt only.
    return len(encoding.ids) - min(prompt.scored, len(encoding.ids) // 2)


def _bos(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []


def _shifted(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by
