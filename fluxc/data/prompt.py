"""What a prompt is, before and after a tokenizer has seen it, and the groups of tasks."""

from __future__ import annotations

import dataclasses

RETRIEVAL = ("needle", "multi-needle", "kv", "variable-tracking", "multi-hop")
"""Tasks whose answer stands far from the question: they need the far context."""

TEXT = ("prose", "code")
"""Continuations: the last part of a text is scored, nothing is asked."""

LOCAL = ("local", "few-shot")
"""Tasks whose question holds its own answer: the long text before it is irrelevant."""

FAR = ("multi-value", "multi-query", "common-words", "questions")
"""Further retrieval tasks, which evaluation asks and calibration does not use."""

REASONING = ("far-sum", "steps")
"""Tasks whose answer is worked out, likewise of evaluation alone: from facts far away, and from the question itself."""

TASKS = RETRIEVAL + TEXT + LOCAL
"""What calibration and training draw from."""

USER_TASK = "user"
CALIBRATION = "calibration"
HELDOUT = "heldout"
SPLITS = (CALIBRATION, HELDOUT)

Span = tuple[int, int]
"""Half-open range, of characters in a Prompt and of tokens in a TokenizedPrompt."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt as text.

    With `chat` the model sees `chat template(text) + prefix`, else text and prefix, one below the other; `answer`
    follows and is scored.
    Without an answer the last `scored` tokens of the text are scored (fewer if the text is short).
    """

    task: str
    text: str
    answer: str = ""
    chat: bool = False
    prefix: str = ""
    """Start of the answer, given to the model and not scored. With a chat template it opens the assistant's turn."""
    facts: tuple[Span, ...] = ()
    """Characters of `text` the answer depends on."""
    question: int | None = None
    """Index in `text` of the first character of the question."""
    scored: int = 0
    seed: int = 0
    length: int = 0
    """Tokens asked for; 0 where nobody asked."""


@dataclasses.dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as token ids: `prompt_len` tokens the model is given, then `answer_len` tokens it is scored on."""

    input_ids: list[int]
    prompt_len: int
    task: str
    facts: tuple[Span, ...] = ()
    """Token spans of the needed facts; their neighbours inside the same token are included."""
    question: int | None = None
    """Index of the question's first token."""
    prompt: Prompt | None = None

    @property
    def asks(self) -> bool:
        """Whether there is an answer to be matched exactly; else the scored tokens are the end of a text."""
        return self.prompt is None or bool(self.prompt.answer)

    @property
    def answer_len(self) -> int:
        """Number of scored tokens."""
        return len(self.input_ids) - self.prompt_len

    @property
    def answer_ids(self) -> list[int]:
        """The scored tokens."""
        return self.input_ids[self.prompt_len :]

    @property
    def logits_at(self) -> list[int]:
        """Rows whose logits predict the scored tokens, in order: one row before each of them."""
        return list(range(self.prompt_len - 1, len(self.input_ids) - 1))

    def __len__(self) -> int:
        return len(self.input_ids)


def group_of(task: str) -> str:
    """Name of the task's group: retrieval, text, local, reasoning, or user for anything fluxc did not generate."""
    groups = {"retrieval": RETRIEVAL + FAR, "text": TEXT, "local": LOCAL, "reasoning": REASONING}
    return next((name for name, tasks in groups.items() if task in tasks), USER_TASK)
