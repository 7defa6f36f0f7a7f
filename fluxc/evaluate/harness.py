"""The model `fluxc` of lm-evaluation-harness: a model.flux or engine folder under its plan.

    lm_eval --model fluxc --model_args path=model.flux,budget=0.4 --tasks ...

works where the harness finds models by entry point; with releases that do not,

    python -m fluxc.evaluate.harness --model fluxc --model_args path=model.flux --tasks ...

is the harness's own command with this model registered. Needs `pip install 'fluxc[eval]'`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F

from fluxc.calibrate.runner import forced
from fluxc.errors import OptionError
from fluxc.evaluate.subjects import EngineSubject, FluxSubject, open_subject
from fluxc.plan import Plan

DEFAULT_LENGTH = 2048
"""Tokens of a window where a model does not say its context; what the harness takes for its own models."""
NEW_TOKENS = 256
GENERATION = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "seed")


@register_model("fluxc")
class FluxLM(TemplateLM):  # type: ignore[misc]  # the harness comes without types
    """Scores and generates under the plan at `budget` (default: the plan's own), or with `routes` full or sparse.

    The routes of a request are decided on its context; those of a rolling window on its first half. Prompts below the
    crossover (measured on this machine, else 2 x (sink + window) tokens) run dense as they do when they are served;
    `guard=False` routes them too, as `fluxc eval` does. Raises OptionError for a model without a plan.
    """

    subject: FluxSubject | EngineSubject
    tokenizer: Any
    _plan: Plan
    _bias: Tensor
    _guard: int
    _max_length: int

    def __init__(
        self,
        path: str,
        budget: float | None = None,
        routes: str | None = None,
        guard: bool = True,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        found = open_subject(path, _device(device))
        if not isinstance(found, (FluxSubject, EngineSubject)) or found.plan is None:
            raise OptionError(f"{path} is no model.flux and no engine", hint="the model `hf` of the harness runs it")
        if routes not in (None, "full", "sparse"):
            raise OptionError(f"routes {routes!r} is not full or sparse")
        self.subject, self.tokenizer = found, found.tokenizer
        self._plan, self._device = found.plan, torch.device(found.device)
        self._bias = self._wanted(budget, routes)
        share = self._plan.budget if budget is None else budget
        guarded = guard and routes is None
        # Shorter prompts run dense.
        self._guard = self.subject.engine(self._plan.decode).crossover(share) if guarded else 0
        self._max_length = max_length or found.sizes.context or DEFAULT_LENGTH

    def _wanted(self, budget: float | None, routes: str | None) -> Tensor:
        if routes is not None:
            return forced([routes == "full"] * self.subject.layers)
        return torch.tensor(self._plan.bias(budget))

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context, as for the harness's own models."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._max_length

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its caches by."""
        return str(self.subject.name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; a text that begins with the first special token does not get it twice."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text the model was trained on."""
        rest = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **rest))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for request, context, continuation in requests:
            found.append(self._score(context, continuation, len(context)))
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, found[-1])
        return found

    def _score(self, context: list[int], continuation: list[int], prompt_len: int) -> tuple[float, bool]:
        """Log-probability of the continuation in nats, and whether it is the greedy one."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        ids, target = whole[:-1], torch.tensor(continuation)
        cut = len(context) + len(continuation) - len(whole)
        prompt_len = min(max(prompt_len - cut, 1), len(ids))
        rows = list(range(len(ids) - len(continuation), len(ids)))
        found, _ = self.subject.prefill(ids, prompt_len, rows, self._routing(prompt_len))
        logits = found.float().cpu()
        greedy = bool((logits.argmax(-1) == target).all())
        return -float(F.cross_entropy(logits, target, reduction="sum")), greedy

    def _routing(self, prompt_len: int) -> Tensor:
        return forced([True] * self.subject.layers) if prompt_len < self._guard else self._bias

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of the context's length, each token predicted once."""
        return [self._rolled(request.args[0]) for request in requests]

    def _rolled(self, text: str) -> float:
        sizes = {"max_seq_len": self.max_length, "context_len": 1, "prefix_token": self.prefix_token_id}
        windows = map(make_disjoint_window, get_rolling_token_windows(token_list=self.tok_encode(text), **sizes))
        total = sum(self._score(before, after, (len(before) + len(after)) // 2)[0] for before, after in windows)
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers of the engine, each under the routes of its own context."""
        found = []
        for request in requests:
            context, given = request.args
            found.append(self._generated(context, given))
            self.cache_hook.add_partial("generate_until", (context, given), found[-1])
        return found

    def _generated(self, context: str, given: dict[str, Any]) -> str:
        options = normalize_gen_kwargs(given, NEW_TOKENS)
        end = self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until", None), eos=end)
        count = options.pop("max_gen_toks")
        if count >= self.max_length:
            raise OptionError(f"{count} new tokens leave no room in a context of {self.max_length}")
        ids = self.tok_encode(context)[-(self.max_length - count) :]
        asked = {name: options[name] for name in GENERATION if options.get(name) is not None}
        if not asked.get("do_sample"):
            asked = {name: asked[name] for name in asked if name == "repetition_penalty"}
        _, full = self.subject.prefill(ids, len(ids), [len(ids) - 1], self._routing(len(ids)))
        engine = self.subject.engine(self._plan.decode)
        stops = tuple(text for text in until if text and text != end)
        answer = engine.generate(ids, routes=full.tolist(), max_new_tokens=count, stop_strings=stops, **asked)
        return str(postprocess_generated_text(answer.text, until, None))


def _device(asked: str | None) -> str:
    """The device asked for. The harness's command asks for a GPU whether or not there is one."""
    if not torch.cuda.is_available():
        return "cpu"
    return asked or "cuda"


def main(argv: Sequence[str] | None = None) -> None:
    """The command of the harness, with the model `fluxc` registered."""
    from lm_eval.__main__ import cli_evaluate

    if argv is not None:
        sys.argv[1:] = list(argv)
    cli_evaluate()


if __name__ == "__main__":
    main()
