"""Prompts to token ids, and tokens back to text piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from fluxc.data.tokenizing import has_chat_template
from fluxc.errors import DataError, FluxcError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Message = Mapping[str, Any]
Prompt: TypeAlias = "str | Sequence[Message] | Sequence[int] | Tensor | np.ndarray"
"""A text as it is, chat messages (through the chat template), or token ids (a list, a tensor or array [S] or [1,S])."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of one prompt; raises DataError for an empty one, and for text where there is no tokenizer."""
    ids = _ids(tokenizer, prompt)
    if not ids:
        raise DataError("the prompt has no tokens", hint="give at least one")
    return ids


def is_batch(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts: of texts, of message lists, of id lists or tensors, or a tensor [B,S]."""
    if _is_tensor(prompt):
        return prompt.ndim == 2 and prompt.shape[0] > 1
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    first = prompt[0]
    return first.ndim > 0 if _is_tensor(first) else isinstance(first, (str, Sequence))


def _is_tensor(x: Any) -> bool:
    """An array or a tensor, told without importing torch."""
    return hasattr(x, "ndim") and hasattr(x, "tolist")


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(required(tokenizer)(checked_text(prompt))["input_ids"])
    values: list[Any] = prompt.flatten().tolist() if _is_tensor(prompt) else list(prompt)
    if values and isinstance(values[0], Mapping):
        return _chat(required(tokenizer), values)
    wrong = [value for value in values if not isinstance(value, int) or isinstance(value, bool)]
    if wrong:
        raise DataError(f"a prompt holds {wrong[0]!r}", hint="give a text, chat messages, or token ids")
    return values


def _chat(tokenizer: Any, messages: list[Any]) -> list[int]:
    if not has_chat_template(tokenizer):
        raise DataError("this model has no chat template", hint="give the prompt as a text")
    for message in messages:
        checked_text(str(message.get("content", "")))
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    except FluxcError:
        raise
    except Exception as cause:  # the template is a program of the model's: it may fail in any way
        raise DataError(f"the chat template does not take these messages: {cause}") from cause


def checked_text(text: str) -> str:
    """The text itself; raises DataError for half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as cause:
        raise DataError("the text holds half a surrogate pair", hint="it is no valid Unicode") from cause
    return text


def required(tokenizer: Any) -> Any:
    """The tokenizer; raises DataError where there is none."""
    if tokenizer is None:
        raise DataError("this model has no tokenizer", hint="give token ids")
    return tokenizer


class TextWriter:
    """Turns tokens into text piece by piece, holding back bytes that are not a whole character yet.

    Each piece is the difference between two decodings of the last few tokens, so that a long answer costs no more per
    token than a short one. Special tokens are no text. Without a tokenizer all text is "".
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = 0
        self._read = 0
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def add(self, token: int) -> str:
        """The text that became readable with one more token."""
        self._tokens.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        if self._tokenizer is None or self._read == len(self._tokens):
            return ""
        before = self._decode(self._begin, self._read)
        after = self._decode(self._begin, len(self._tokens))
        if after.endswith("\ufffd") and not final:
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        piece = after[len(before) :]
        self._pieces.append(piece)
        return piece

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))
