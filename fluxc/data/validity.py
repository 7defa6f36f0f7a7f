"""When a prompt counts: the facts it needs are out of a sparse layer's reach, or all in it, as its task says."""

from __future__ import annotations

from fluxc.data.prompt import FAR, LOCAL, RETRIEVAL, TokenizedPrompt

FACTS_FAR = (*RETRIEVAL, *FAR, "far-sum")
FACTS_NEAR = (*LOCAL, "steps")

ANSWER_ROOM = 48
"""Tokens kept free for an answer."""
TASK_ROOM = 256
"""Tokens kept free for the facts, the question and a chat template."""


def minimum_length(sink: int, window: int) -> int:
    """Tokens to ask for to get a valid retrieval prompt: 2 * (sink + window) for the prompt, and its answer on top.

    Small windows need room for what stands outside the haystack too. Prompts may come out 2 % shorter than asked for.
    """
    reach = sink + window
    return max(2 * reach + ANSWER_ROOM, reach + TASK_ROOM) * 50 // 49 + 1


def validate(prompt: TokenizedPrompt, sink: int, window: int) -> str:
    """Why a prompt is not a valid one of its task, or "" if it is.

    Retrieval: the prompt has at least 2 * (sink + window) tokens, and each needed fact lies outside the sink and
    outside the window of the question's first token. Local: each needed fact lies inside the window of the prompt's
    last token.
    """
    if prompt.task in FACTS_FAR:
        return _far(prompt, sink, window)
    if prompt.task in FACTS_NEAR:
        return _near(prompt, window)
    return ""


def _far(prompt: TokenizedPrompt, sink: int, window: int) -> str:
    shortest = 2 * (sink + window)
    if prompt.prompt_len < shortest:
        return f"the prompt has {prompt.prompt_len} tokens, fewer than 2 * (sink + window) = {shortest}"
    if prompt.question is None or not prompt.facts:
        return "the prompt does not say where its question and its facts are"
    first, last = min(a for a, _ in prompt.facts), max(b for _, b in prompt.facts) - 1
    if first < sink:
        return f"a fact starts at token {first}, inside the sink of {sink}"
    if prompt.question - last < window:
        return f"a fact ends {prompt.question - last} tokens before the question, inside the window of {window}"
    return ""


def _near(prompt: TokenizedPrompt, window: int) -> str:
    first = min((a for a, _ in prompt.facts), default=prompt.prompt_len)
    distance = prompt.prompt_len - 1 - first
    if distance >= window:
        return f"a fact starts {distance} tokens before the prompt's end, outside the window of {window}"
    return ""
