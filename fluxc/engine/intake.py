"""Checks what callers ask for and makes requests of it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fluxc.engine.backend import make_sampler
from fluxc.engine.conversation import Conversation
from fluxc.engine.keeper import Keeper
from fluxc.engine.options import GenerationOptions
from fluxc.engine.request import Request
from fluxc.engine.sequence import TokenSequence
from fluxc.engine.text import Prompt, TextWriter, prompt_ids
from fluxc.errors import ContextError, DataError, OptionError, PlanError
from fluxc.plan import Plan

Routes = Any
"""bool[L]: a list, an array, or a tensor."""


@dataclasses.dataclass(frozen=True)
class Intake:
    """What the requests of one engine are checked against; see Engine for the meaning of each."""

    programs: Any
    plan: Plan
    tokenizer: Any
    eos_ids: tuple[int, ...]
    crossover: Callable[[float], int]
    keeper: Keeper
    context: int

    def request(
        self,
        prompt: Prompt,
        *,
        budget: float | None = None,
        routes: Routes | None = None,
        conversation: Conversation | None = None,
        reroute: bool = False,
        **generation: Any,
    ) -> Request:
        """A request of which all that can be known to fail was refused; see Engine.submit."""
        options = GenerationOptions.from_dict(generation)
        sequence, new = self._sequence(prompt, budget, routes, conversation, reroute)
        known = [*sequence.tokens, *new]
        request = Request(
            sequence=sequence,
            new=tuple(new),
            options=options,
            limit=min(options.max_new_tokens, self._room(len(known))),
            full_share=self._budget(budget),
            sampler=make_sampler(self.programs, options, known, self.eos_ids, self.tokenizer),
            writer=TextWriter(self.tokenizer),
        )
        self.keeper.check_fits(request)
        if conversation is not None:
            request.replaces = conversation.sequence if conversation.sequence is not sequence else None
            request.keep = conversation.begin(sequence, prompt)
        return request

    def _budget(self, budget: float | None) -> float:
        return self.plan.budget if budget is None else budget

    def _sequence(
        self,
        prompt: Prompt,
        budget: float | None,
        routes: Routes | None,
        conversation: Conversation | None,
        reroute: bool,
    ) -> tuple[TokenSequence, list[int]]:
        """The sequence a request continues, and the tokens that come behind it first."""
        if conversation is not None:
            conversation.check_free()
        if conversation is None or conversation.sequence is None:
            return self._new_sequence(prompt_ids(self.tokenizer, prompt), budget, routes), []
        if reroute:
            return self._new_sequence(conversation.whole_ids(self.tokenizer, prompt, self.eos_ids), budget, routes), []
        if budget is not None or routes is not None:
            raise OptionError("a conversation keeps the routes of its first turn", hint="reroute=True chooses anew")
        return conversation.sequence, self._known(conversation.turn_ids(self.tokenizer, prompt, self.eos_ids))

    def _new_sequence(self, ids: list[int], budget: float | None, routes: Routes | None) -> TokenSequence:
        if routes is not None:
            bias = self._forced(routes)
        else:
            bias = self.plan.bias(budget)
            if len(ids) < self.crossover(self._budget(budget)):
                bias = [math.inf] * len(bias)
        return TokenSequence(self._known(ids), len(ids), bias, dense=all(value == math.inf for value in bias))

    def _forced(self, routes: Routes) -> list[float]:
        flags = np.asarray(routes.tolist() if hasattr(routes, "tolist") else routes, bool)
        if tuple(flags.shape) != (len(self.plan.layers),):
            raise PlanError(f"routes have shape {list(flags.shape)}, not [{len(self.plan.layers)}] (routable layers)")
        return [math.inf if flag else -math.inf for flag in flags.tolist()]

    def _known(self, ids: list[int]) -> list[int]:
        wrong = [token for token in ids if not 0 <= token < self.programs.vocabulary]
        if wrong:
            raise DataError(f"token {wrong[0]} is outside the model's vocabulary of {self.programs.vocabulary}")
        return ids

    def _room(self, tokens: int) -> int:
        """Tokens that fit behind `tokens`; raises DataError where there is no room for one."""
        context = self.context or sys.maxsize
        if tokens >= context:
            raise ContextError(
                f"a prompt of {tokens} tokens leaves no room for an answer in a context of {context}",
                hint=f"shorten it to less than {context} tokens",
            )
        return context - tokens
