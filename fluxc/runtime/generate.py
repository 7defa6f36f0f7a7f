"""Short answers by recomputation: one forward pass over the whole text for each new token.

Routes are decided once, by the prompt, and forced from then on. There is no KV cache here: each token costs a prefill.
The KV engine replaces this module; routes, tokens and `kv_bytes` stay what they are here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fluxc.errors import DataError, OptionError
from fluxc.runtime.clock import now

if TYPE_CHECKING:
    from fluxc.runtime.model import FluxModel, Prefill, Routes

Prompt = str | Sequence[dict[str, str]] | Sequence[int] | Tensor


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer. routes bool[L] and scores f32[L] are the prompt's (scores None where no router ran).

    `tokens` are new ids, the stopping one included; `text` is "" without a tokenizer. Seconds: the prompt's prefill up
    to the first token, and all further tokens. `kv_bytes` is what an engine keeps after the last token under these
    routes and the plan's `decode`.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    routes: Tensor
    scores: Tensor | None
    sparse_ratio: float
    prefill_seconds: float
    decode_seconds: float
    kv_bytes: int
    finish: Literal["stop", "length"]


@torch.no_grad()
def generate(
    model: FluxModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    budget: float | None = None,
    routes: Routes | None = None,
    stop_ids: Sequence[int] | None = None,
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """Greedy answer to a text (as it is), chat messages (through the chat template), or token ids.

    `stop_ids` default to the model's end-of-text tokens. `stream` gets each new piece of text. Raises DataError for a
    prompt that fills the context or has no tokens, OptionError for max_new_tokens below 1.
    """
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens {max_new_tokens} is below 1")
    ids = prompt_ids(model, prompt)
    count = min(max_new_tokens, _room(model, len(ids)))
    stops = set(stop_ids_of(model) if stop_ids is None else stop_ids)
    writer = TextWriter(model, stream) if _has_text(model, prompt) else None
    first = model.prefill([ids], budget=budget, routes=routes)
    start = now(model.device)
    tokens = _continue(model, ids, first, count, stops, writer)
    seconds = now(model.device) - start
    prompt_routes = first.routes[:, 0].cpu()
    return Generation(
        text=writer.finish() if writer else "",
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        routes=prompt_routes,
        scores=None if first.scores is None else first.scores[:, 0].cpu(),
        sparse_ratio=first.sparse_ratio,
        prefill_seconds=first.seconds,
        decode_seconds=seconds,
        kv_bytes=model.plan.kv_bytes(prompt_routes, len(ids) + len(tokens)),
        finish="stop" if tokens[-1] in stops else "length",
    )


def _room(model: FluxModel, prompt_tokens: int) -> int:
    """Tokens that fit after the prompt; raises DataError where there is no room for one."""
    context = model.plan.model.context or sys.maxsize
    if prompt_tokens >= context:
        raise DataError(
            f"a prompt of {prompt_tokens} tokens leaves no room for an answer in a context of {context}",
            hint=f"shorten it to less than {context} tokens",
        )
    return context - prompt_tokens


def _continue(
    model: FluxModel, ids: list[int], first: Prefill, count: int, stops: set[int], writer: TextWriter | None
) -> list[int]:
    """Greedy tokens after the prompt `ids`, whose prefill is `first`; at most `count`, up to one of `stops`."""
    logits, tokens = first.logits, []
    while True:
        tokens.append(int(logits[0, -1].argmax()))
        if writer and tokens[-1] not in stops:
            writer.add(tokens[-1])
        if tokens[-1] in stops or len(tokens) == count:
            return tokens
        again = _rerun(model, ids + tokens, len(ids), first)
        logits = again.logits


def _rerun(model: FluxModel, ids: list[int], prompt_len: int, first: Prefill) -> Prefill:
    """The text so far on the program and under the routes that its prompt chose."""
    if first.program == "captured":
        return model.prefill([ids], program="captured")
    return model.prefill([ids], prompt_lens=[prompt_len], routes=first.routes, program="routed")


def prompt_ids(model: FluxModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; raises DataError where a text is given and the directory holds no tokenizer."""
    if isinstance(prompt, Tensor):
        return [int(token) for token in prompt.flatten().tolist()]
    if isinstance(prompt, str):
        return list(model.tokenizer(prompt)["input_ids"])
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], dict):
        return list(
            model.tokenizer.apply_chat_template(items, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    return items


def stop_ids_of(model: FluxModel) -> list[int]:
    """The end-of-answer tokens that capture found in the source; [] where it names none."""
    return [int(token) for token in model.meta.get("eos_ids", [])]


def _has_text(model: FluxModel, prompt: Prompt) -> bool:
    return isinstance(prompt, str) or model.has_tokenizer


class TextWriter:
    """Turns tokens into text piece by piece, holding back bytes that are not a whole character yet."""

    def __init__(self, model: FluxModel, stream: Callable[[str], None] | None) -> None:
        self._tokenizer, self._stream = model.tokenizer, stream
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> None:
        """Take one more token, and stream what became readable."""
        self._tokens.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):
            self._show(text)

    def finish(self) -> str:
        """Stream what was held back and return the whole text."""
        text = self._text()
        self._show(text)
        return text

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if self._stream and len(text) > self._shown:
            self._stream(text[self._shown :])
        self._shown = max(self._shown, len(text))
