"""`fluxc eval`: suites under every routing, one row a prompt and routing, summed up with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxc.bench.systems import System, plan_name
from fluxc.data import TokenizedPrompt, corpus
from fluxc.data.haystack import Texts
from fluxc.errors import OptionError
from fluxc.evaluate.conditions import conditions
from fluxc.evaluate.long_answer import LongAnswers
from fluxc.evaluate.options import EvalOptions
from fluxc.evaluate.oracle import Oracle
from fluxc.evaluate.routings import Follower, followers, full_layers, independent, mean_count, random_bias
from fluxc.evaluate.scorer import Sample, Scorer
from fluxc.evaluate.static import BestStatic
from fluxc.evaluate.store import Store
from fluxc.evaluate.subjects import FluxSubject, Subject
from fluxc.evaluate.suites import EXACT, SUITES, USER, lengths_of, prompts_of, user_prompts
from fluxc.evaluate.summary import summaries
from fluxc.progress import SILENT, Progress

FORMAT = 1
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """One suite, ready to run."""

    name: str
    prompts: list[TokenizedPrompt]
    lengths: tuple[int, ...]
    rule: str
    generates: bool


class Evaluation:
    """One evaluation of one subject; `run` gives plain values for JSON. Raises as `open_suites` does."""

    def __init__(
        self,
        subject: Subject,
        options: EvalOptions,
        store: Store,
        *,
        texts: Texts = corpus,
        data: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.subject, self.options, self.store, self.texts, self.progress = subject, options, store, texts, progress
        self.budgets = options.budgets or ((subject.plan.budget,) if subject.plan else ())
        self.scorer = Scorer(subject, store, options.batch(subject.device))
        self.static = self._static()
        self._oracle = self._oracle_of()
        self.suites = [self._suite(name, data) for name in options.suites]

    @property
    def independent(self) -> list[System]:
        """Routings that are known before anything runs; a model without routes has one."""
        if self.subject.plan is None:
            return [System("dense", torch.zeros(0))]
        return independent(self.subject.layers, self._plan_bias, self.budgets)

    @property
    def followers(self) -> list[Follower]:
        """Routings that follow the plan's Ω."""
        return followers(self.budgets, self.static is not None, self.options.oracle) if self.subject.plan else []

    def passes(self) -> int:
        """Forward passes of the whole evaluation, the choice of static layers and long answers apart."""
        beside = len(self.followers)
        return sum(
            len(suite.prompts) * (self._each(suite) + (0 if suite.generates else beside)) for suite in self.suites
        )

    def run(self) -> dict[str, Any]:
        """Every suite; conditions, rows and summaries."""
        rows = [row for suite in self.suites for row in self._run(suite)]
        scored = [row for row in rows if not SUITES.get(row["suite"], SUITES["text"]).generates]
        kept = {row["key"] for row in rows if "key" in row}
        sizes = self.subject.sizes
        return {
            "format": FORMAT,
            "conditions": conditions(self.subject, self.options, self.budgets, self.texts),
            "suites": {suite.name: self._described(suite) for suite in self.suites},
            "static": {str(count): name for count, name in sorted(self.static.chosen.items())} if self.static else {},
            "rows": rows,
            "summary": summaries(scored, 2 * (sizes.sink + sizes.window)),
            "kept": {key: value for key, value in self.store.known.items() if key not in kept},
        }

    def _suite(self, name: str, data: Path | None) -> Planned:
        if name == USER:
            if data is None:
                raise OptionError("the suite user has no prompts", hint="give a JSONL file with --data")
            found = user_prompts(data, self.subject.tokenizer, self.subject.sizes.context)
            return Planned(USER, found, (), EXACT, False)
        suite, sizes, options = SUITES[name], self.subject.sizes, self.options
        if suite.generates and self.subject.plan is None:
            raise OptionError(f"the suite {name} decodes under a plan", hint="`fluxc transform` the model first")
        lengths = lengths_of(name, sizes, options.lengths)
        self.progress.start(f"writing prompts: {name}")
        prompts = prompts_of(name, self.subject.tokenizer, sizes, lengths, options.count, options.seed, self.texts)
        return Planned(name, prompts, lengths, suite.rule, suite.generates)

    def _described(self, suite: Planned) -> dict[str, Any]:
        tasks = list(dict.fromkeys(prompt.task for prompt in suite.prompts))
        return {"tasks": tasks, "lengths": list(suite.lengths), "prompts": len(suite.prompts), "rule": suite.rule}

    def _run(self, suite: Planned) -> list[Row]:
        self.progress.start(suite.name, len(suite.prompts) * self._each(suite))
        if suite.generates:
            return self._long(suite)
        first = self._all(suite, lambda prompt: [system.bias for system in self.independent])
        names: list[tuple[str, float | None]] = [(s.name, _number(s.budget)) for s in self.independent]
        beside = self.followers
        if not beside:
            return self._rows(suite, names, first)
        biases = self._follow(suite, dict(zip((name for name, _ in names), zip(*first, strict=True), strict=True)))
        self.progress.start(f"{suite.name}, at equal Ω", len(suite.prompts) * len(beside))
        second = self._all(suite, biases)
        names += [(follower.name, follower.budget) for follower in beside]
        return self._rows(suite, names, [a + b for a, b in zip(first, second, strict=True)])

    def _each(self, suite: Planned) -> int:
        """Steps a prompt."""
        if suite.generates:
            return len(LongAnswers(self.subject, self.scorer, self.store).decodes) * (len(self.independent) - 1) + 1
        return len(self.independent)

    def _all(self, suite: Planned, biases: Callable[[TokenizedPrompt], Sequence[Tensor]]) -> list[list[Sample]]:
        """Samples of each prompt, those of this process's part computed first; the others may be there by then."""
        index, parts = self.options.part
        order = sorted(range(len(suite.prompts)), key=lambda at: (at % parts != index - 1, at))
        found = {}
        for at in order:
            prompt = suite.prompts[at]
            found[at] = self.scorer.scores(prompt, biases(prompt), lambda: self.progress.advance())
        return [found[at] for at in range(len(suite.prompts))]

    def _follow(
        self, suite: Planned, samples: dict[str, tuple[Sample, ...]]
    ) -> Callable[[TokenizedPrompt], Sequence[Tensor]]:
        """The biases of the followers on a prompt, from the samples of the plan's own systems."""
        place = {id(prompt): at for at, prompt in enumerate(suite.prompts)}
        static = {budget: self._static_bias(samples[plan_name(budget)]) for budget in self.budgets}

        def bias(follower: Follower, prompt: TokenizedPrompt) -> Tensor:
            count = full_layers(samples[plan_name(follower.budget)][place[id(prompt)]])
            if follower.kind == "random":
                return random_bias(prompt, self.subject.layers, count, self.options.seed)
            if follower.kind == "best static":
                return static[follower.budget]
            assert self._oracle is not None
            return self._oracle.bias(prompt, self.subject.layers, count)

        return lambda prompt: [bias(follower, prompt) for follower in self.followers]

    def _static_bias(self, samples: Sequence[Sample]) -> Tensor:
        return self.static(mean_count(samples)) if self.static else torch.zeros(0)

    def _rows(
        self, suite: Planned, names: Sequence[tuple[str, float | None]], found: Sequence[Sequence[Sample]]
    ) -> list[Row]:
        rows = []
        for at, (prompt, samples) in enumerate(zip(suite.prompts, found, strict=True)):
            for (name, budget), sample in zip(names, samples, strict=True):
                rows.append({**_head(suite, at, prompt), "system": name, "budget": budget, **sample})
        return rows

    def _long(self, suite: Planned) -> list[Row]:
        answers = LongAnswers(self.subject, self.scorer, self.store)
        rows = []
        for at, prompt in enumerate(suite.prompts):
            systems = self.independent
            found = answers.rows(prompt, systems, lambda: self.progress.advance())
            names = [s for s in systems for _ in (answers.decodes[:1] if s.name == "dense" else answers.decodes)]
            for system, row in zip(names, found, strict=True):
                budget = _number(system.budget)
                rows.append({**_head(suite, at, prompt), "system": system.name, "budget": budget, **row})
        return rows

    def _plan_bias(self, budget: float) -> Tensor:
        assert self.subject.plan is not None
        return torch.tensor(self.subject.plan.bias(budget))

    def _static(self) -> BestStatic | None:
        subject = self.subject
        if not isinstance(subject, FluxSubject):
            return None
        measured = (subject.model.flux.path / "measurements" / "calibration.json").is_file()
        if not measured or "effort" not in subject.model.plan.calibration:
            self.progress.note("no best static choice: the folder holds no measurements of a calibration")
            return None
        return BestStatic(subject.model, self.scorer, self.store, self.progress)

    def _oracle_of(self) -> Oracle | None:
        if not self.options.oracle:
            return None
        if not isinstance(self.subject, FluxSubject):
            raise OptionError("an oracle needs the routed program", hint="evaluate a model.flux folder")
        program = self.subject.model.routed_program
        return Oracle(program, self.options.oracle, self.store, self.subject.device)


def _head(suite: Planned, at: int, prompt: TokenizedPrompt) -> Row:
    length = prompt.prompt.length if prompt.prompt else 0
    return {"suite": suite.name, "task": prompt.task, "prompt": at, "length": length, "tokens": len(prompt)}


def _number(value: float) -> float | None:
    return None if value != value else value
