"""From a request to what the engine is asked."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from fluxc.engine.options import SEEDS
from fluxc.serve.errors import ApiError
from fluxc.serve.options import ServeOptions
from fluxc.serve.schema import ChatRequest, CompletionRequest

COMPLETION_TOKENS = 16
"""What OpenAI's completions take for max_tokens where it is not given."""
UNLIMITED = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Ask:
    """One answer to be computed, to prompt number `row`. `prompt`: text, token ids or messages. `options`: of
    `Engine.submit`."""

    index: int
    row: int
    prompt: Any
    options: dict[str, Any]
    stops: tuple[str, ...]
    logprobs: int | None


def of_completion(request: CompletionRequest, settings: ServeOptions) -> list[Ask]:
    """n answers to each prompt, those of the first prompt first; raises ApiError."""
    prompts = request.prompts
    if not prompts:
        raise ApiError(400, "prompt is empty", param="prompt")
    tokens = _limit(request.max_tokens or COMPLETION_TOKENS, settings, given=request.max_tokens is not None)
    return _asks(request, prompts, tokens, request.logprobs, settings)


def of_chat(request: ChatRequest, settings: ServeOptions) -> list[Ask]:
    """n answers to the messages; raises ApiError."""
    given = request.max_completion_tokens or request.max_tokens
    tokens = _limit(given or UNLIMITED, settings, given=given is not None)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _asks(request, [[message.plain() for message in request.messages]], tokens, logprobs, settings)


def _limit(tokens: int, settings: ServeOptions, given: bool) -> int:
    most = settings.max_new_tokens
    if most is None or tokens <= most:
        return tokens
    if given:
        raise ApiError(400, f"max_tokens {tokens} is more than this server's limit of {most}", param="max_tokens")
    return most


def _asks(
    request: CompletionRequest | ChatRequest,
    prompts: list[Any],
    tokens: int,
    logprobs: int | None,
    settings: ServeOptions,
) -> list[Ask]:
    count = len(prompts) * request.choices
    if count > settings.max_choices:
        limit = settings.max_choices
        raise ApiError(400, f"{count} answers in one request are more than this server's limit of {limit}", param="n")
    options = _options(request, tokens, logprobs)
    asked = itertools.product(enumerate(prompts), range(request.choices))
    return [
        Ask(at, row, prompt, {**options, "seed": _seed(request.seed, turn)}, request.stops, logprobs)
        for at, ((row, prompt), turn) in enumerate(asked)
    ]


def _options(request: CompletionRequest | ChatRequest, tokens: int, logprobs: int | None) -> dict[str, Any]:
    given: dict[str, Any] = {
        "budget": request.budget,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "min_new_tokens": request.min_tokens,
        "eos_token_id": [] if request.ignore_eos else None,
        "logprobs": logprobs,
    }
    return {
        "max_new_tokens": tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": request.top_k or 0,
        **{name: value for name, value in given.items() if value is not None},
    }


def _seed(seed: int | None, turn: int) -> int | None:
    """Each of n answers draws numbers of its own."""
    return None if seed is None else (seed + turn) % SEEDS
