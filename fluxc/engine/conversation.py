"""A kept cache: further turns cost their own tokens alone, under the routes that the first turn chose."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

from fluxc.engine.result import Generation
from fluxc.engine.sequence import TokenSequence
from fluxc.engine.text import Prompt, checked_text, prompt_ids, required
from fluxc.errors import DataError


class Conversation:
    """Made by `Engine.conversation()`, given to `generate` and `submit`. `close` (or `with`) gives its pages back.

    A conversation that is forgotten gives them back too, a moment later: `forget` does not wait, `release` does.

    `messages`: what was said so far, where turns are chat messages; a turn then holds the new messages alone. Pages of
    a conversation that waits may be taken for running requests: its next turn computes them again.
    """

    def __init__(
        self, release: Callable[[TokenSequence], None], forget: Callable[[TokenSequence], None] | None = None
    ) -> None:
        self.messages: list[dict[str, Any]] = []
        self.running = False
        # In a list of its own, so that the finalizer sees the last one without holding the conversation.
        self._kept: list[TokenSequence] = []
        self._release = release
        weakref.finalize(self, _release_all, self._kept, forget or release)

    @property
    def sequence(self) -> TokenSequence | None:
        """What is kept; None before the first turn."""
        return self._kept[0] if self._kept else None

    @sequence.setter
    def sequence(self, value: TokenSequence | None) -> None:
        self._kept[:] = [] if value is None else [value]

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens so far, prompts and answers."""
        return tuple(self.sequence.tokens) if self.sequence else ()

    def check_free(self) -> None:
        """Raise DataError while a turn is running."""
        if self.running:
            raise DataError("this conversation's last turn is still running", hint="wait for its result, or cancel it")

    def close(self) -> None:
        """Give back the pages; the conversation starts anew."""
        self.check_free()
        _release_all(self._kept, self._release)
        self.messages = []

    def begin(self, sequence: TokenSequence, prompt: Prompt) -> Callable[[Generation], None]:
        """A turn is submitted; returns what is to be called with its result."""
        messages = messages_of(prompt)
        before = len(self.tokens) if sequence is self.sequence else 0
        self.sequence, self.running = sequence, True

        def end(result: Generation) -> None:
            self.running = False
            if result.tokens:
                self.messages += [*messages, {"role": "assistant", "content": result.text}] if messages else []
            elif before:
                del sequence.tokens[before:]
            else:
                self.sequence = None

        return end

    def turn_ids(self, tokenizer: Any, prompt: Prompt, eos_ids: Collection[int]) -> list[int]:
        """Tokens that a further turn puts behind those there are.

        Raises DataError where chat messages follow a plain text, and where the chat template renders the last answer
        differently now that more follows it.
        """
        messages = messages_of(prompt)
        if bool(messages) != bool(self.messages):
            raise DataError("a conversation is either chat messages or plain text and token ids, not both")
        if messages:
            text = self._rendered_turn(required(tokenizer), messages, eos_ids)
            return list(tokenizer(checked_text(text), add_special_tokens=False)["input_ids"])
        if isinstance(prompt, str):
            return prompt_ids(None, required(tokenizer)(checked_text(prompt), add_special_tokens=False)["input_ids"])
        return prompt_ids(None, prompt)

    def whole_ids(self, tokenizer: Any, prompt: Prompt, eos_ids: Collection[int]) -> list[int]:
        """All tokens, to be routed anew together with this turn."""
        messages = messages_of(prompt)
        if messages and self.messages:
            return prompt_ids(tokenizer, [*self.messages, *messages])
        return [*self.tokens, *self.turn_ids(tokenizer, prompt, eos_ids)]

    def _rendered_turn(self, tokenizer: Any, messages: list[dict[str, Any]], eos_ids: Collection[int]) -> str:
        """What the template writes behind the last answer: its end, the new messages, the beginning of an answer."""

        def render(known: list[dict[str, Any]]) -> str:
            return str(tokenizer.apply_chat_template(known, add_generation_prompt=True, tokenize=False))

        before, whole = render(self.messages[:-1]), render([*self.messages, *messages])
        answer = str(self.messages[-1]["content"]).strip()
        rest = whole.removeprefix(before).lstrip() if whole.startswith(before) else ""
        if not rest.startswith(answer) or (not rest and before != whole):
            raise DataError("the chat template changes earlier turns when new ones follow", hint="reroute=True")
        rest = rest.removeprefix(answer)
        last = self.tokens[-1]
        return rest.lstrip().removeprefix(tokenizer.decode([last])) if last in eos_ids else rest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.running:
            self.close()


def _release_all(kept: list[TokenSequence], release: Callable[[TokenSequence], None]) -> None:
    while kept:
        release(kept.pop())


def messages_of(prompt: Any) -> list[dict[str, Any]]:
    """The prompt as chat messages, [] where it is none."""
    if isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping):
        return [dict(message) for message in prompt]
    return []
