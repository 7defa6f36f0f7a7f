"""What must hold: dense is dense, numbers do not depend on how they were computed, controls are fair."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxc.bench.systems import top_layers
from fluxc.calibrate.runner import Outcome, forced
from fluxc.data import HELDOUT, TokenizedPrompt, generate
from fluxc.errors import DataError, OptionError
from fluxc.evaluate.evaluation import Evaluation
from fluxc.evaluate.options import EvalOptions
from fluxc.evaluate.oracle import Oracle
from fluxc.evaluate.scorer import Scorer
from fluxc.evaluate.store import Store
from fluxc.evaluate.subjects import DenseSubject, FluxSubject, open_subject
from fluxc.options import canonical_digest

OPTIONS = EvalOptions(suites=("needle", "text", "local"), count=2, budgets=(0.3, 0.7), lengths=(400,))
LAYERS = 2


def run(subject: Any, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    store = Store(folder, subject.digest)
    return Evaluation(subject, dataclasses.replace(OPTIONS, **changes), store).run()


@pytest.fixture(scope="module")
def result(subject: FluxSubject) -> dict[str, Any]:
    return run(subject)


@pytest.fixture(scope="module")
def source(folder: Path) -> DenseSubject:
    """The model that was transformed."""
    found = open_subject(folder / "tiny", "cpu")
    assert isinstance(found, DenseSubject)
    return found


@pytest.fixture(scope="module")
def answered(subject: FluxSubject) -> list[TokenizedPrompt]:
    """Prompts whose answers are what the dense model says itself: it gets them right, and routing can lose them."""
    found = []
    for prompt in generate(["prose"], 6, subject.tokenizer, [300], 7, HELDOUT, 4, 96):
        ids = prompt.input_ids[:280]
        for _ in range(4):
            ids = [*ids, int(subject.model.prefill(ids, program="captured").logits[0, -1].argmax())]
        found.append(TokenizedPrompt(ids, 280, "needle"))
    return found


def test_all_full_equals_the_dense_model(
    subject: FluxSubject, source: DenseSubject, answered: list[TokenizedPrompt], result: dict[str, Any]
) -> None:
    full = forced([True] * LAYERS)[:, None]
    for prompt in answered:
        (routed,), (dense,) = subject.outcomes(prompt, full), source.outcomes(prompt, torch.zeros(0, 1))
        assert (routed.exact, dense.exact) == (True, True)
        assert routed.loss == pytest.approx(dense.loss, abs=1e-5)
    assert not all(subject.outcomes(prompt, -full)[0].exact for prompt in answered)

    # The dense model has no plan: the same prompts are scored one by one.
    for suite in Evaluation(subject, OPTIONS, Store(None, "")).suites:
        rows = [row for row in result["rows"] if row["suite"] == suite.name and row["system"] == "dense"]
        for row, prompt in zip(rows, suite.prompts, strict=True):
            found = source.outcomes(prompt, torch.zeros(0, 1))[0]
            assert row["loss"] == pytest.approx(found.loss, abs=1e-5)
            assert row["exact"] in (None, found.exact)


def test_all_full_is_the_captured_program_bit_for_bit(subject: FluxSubject, answered: list[TokenizedPrompt]) -> None:
    model, prompt = subject.model, answered[0]
    batch = model.batch(prompt.input_ids, prompt_lens=[prompt.prompt_len], logits_at=[prompt.logits_at])
    routed = model.run_routed(batch, forced([True] * LAYERS)[:, None]).logits
    assert torch.equal(routed, model.captured(*batch.captured()))


def test_every_prompt_has_every_system(result: dict[str, Any]) -> None:
    systems = ["dense", "every second layer", "all sparse", "fluxc 0.3", "fluxc 0.7"]
    systems += ["best static 0.3", "random 0.3", "best static 0.7", "random 0.7"]
    for suite in OPTIONS.suites:
        for prompt in range(OPTIONS.count):
            rows = [r for r in result["rows"] if (r["suite"], r["prompt"]) == (suite, prompt)]
            assert [row["system"] for row in rows] == systems
    assert {row["routes"] for row in result["rows"] if row["system"] == "dense"} == {"1" * LAYERS}
    assert {row["routes"] for row in result["rows"] if row["system"] == "all sparse"} == {"0" * LAYERS}
    assert result["conditions"]["corpus"] and result["suites"]["needle"]["rule"].startswith("exact:")


def test_controls_have_the_full_layers_of_the_plan(result: dict[str, Any]) -> None:
    for suite in OPTIONS.suites:
        rows = [row for row in result["rows"] if row["suite"] == suite]
        ours, blind, static = (
            [row["routes"] for row in rows if row["system"] == f"{name} 0.7"]
            for name in ("fluxc", "random", "best static")
        )
        assert [routes.count("1") for routes in blind] == [routes.count("1") for routes in ours]
        assert len(set(static)) == 1
        mean = sum(routes.count("1") for routes in ours) / len(ours)
        assert mean <= static[0].count("1") < mean + 1


def test_same_seed_same_numbers(subject: FluxSubject, result: dict[str, Any]) -> None:
    again = run(subject)
    assert again["rows"] == result["rows"]
    assert run(subject, suites=("needle",), seed=1)["rows"] != [r for r in result["rows"] if r["suite"] == "needle"]


def test_two_processes_that_share_the_work_give_the_same_numbers(
    subject: FluxSubject, tmp_path: Path, result: dict[str, Any]
) -> None:
    runs = Counted(subject)
    second = run(runs, tmp_path, part=(2, 2))
    done = runs.count
    first = run(runs, tmp_path, part=(1, 2))
    assert second["rows"] == first["rows"] == result["rows"]
    assert runs.count == done, "what one process has stored, the other takes"


def test_scores_do_not_depend_on_the_batch(subject: FluxSubject, result: dict[str, Any]) -> None:
    for mine, other in zip(run(subject, together=5)["rows"], result["rows"], strict=True):
        assert (mine["exact"], mine["routes"], mine["system"]) == (other["exact"], other["routes"], other["system"])
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_an_interrupted_run_resumes(subject: FluxSubject, tmp_path: Path, result: dict[str, Any]) -> None:
    stops = Counted(subject, after=7)
    with pytest.raises(KeyboardInterrupt):
        run(stops, tmp_path)
    kept = len(list(tmp_path.iterdir()))
    assert kept == 7
    (tmp_path / "cut-off.json").write_text('{"loss": 1')
    rest = Counted(subject)
    assert run(rest, tmp_path)["rows"] == result["rows"]
    total = Counted(subject)
    run(total)
    assert rest.count == total.count - 7


class Counted(FluxSubject):
    """The subject, counting its runs; it is interrupted after some."""

    def __init__(self, subject: FluxSubject, after: int = 1 << 30) -> None:
        self.__dict__.update(subject.__dict__)
        self._after, self.count = after, 0

    def outcomes(self, prompt: TokenizedPrompt, biases: torch.Tensor) -> list[Outcome]:
        if self.count == self._after:
            raise KeyboardInterrupt
        self.count += 1
        return super().outcomes(prompt, biases)


def test_a_model_without_routes_runs_dense_alone(source: DenseSubject) -> None:
    found = run(source, suites=("text",), lengths=(), count=1)
    assert {row["system"] for row in found["rows"]} == {"dense"}
    assert found["summary"][0]["sparse_ratio"] == found["summary"][0]["input_dependent"] == 0.0
    with pytest.raises(OptionError, match="decodes under a plan"):
        run(source, suites=("long-answer",))


def test_the_greedy_oracle_takes_the_best_layer(subject: FluxSubject, answered: list[TokenizedPrompt]) -> None:
    scorer, store = Scorer(subject, Store(None, "")), Store(None, "")
    oracle = Oracle(subject.model.routed_program, "greedy", store, "cpu")
    for prompt in answered[:2]:
        one_sparse = [forced([at != gone for at in range(LAYERS)]) for gone in range(LAYERS)]
        best = min(scorer.scores(prompt, one_sparse), key=lambda sample: sample["loss"])
        chosen = scorer.scores(prompt, [oracle.bias(prompt, LAYERS, LAYERS - 1)])[0]
        assert chosen["routes"] == best["routes"]
        assert oracle.bias(prompt, LAYERS, LAYERS).tolist() == forced([True] * LAYERS).tolist()


def test_the_ranking_oracle_ranks_by_the_prompts_own_needs(subject: FluxSubject) -> None:
    from fluxc.calibrate.needs import measure_needs

    prompt = generate(["needle"], 1, subject.tokenizer, [400], 3, HELDOUT, 4, 96)[0]
    oracle = Oracle(subject.model.routed_program, "ranking", Store(None, ""), "cpu")
    need = measure_needs(subject.model.routed_program, [prompt], (0.0, 0.5))[0].need
    assert oracle.bias(prompt, LAYERS, 1).tolist() == top_layers(need, 1).tolist()


def test_what_a_model_without_tokenizer_says(tmp_path: Path) -> None:
    from fluxc.toy_flux import toy_flux

    toy_flux(tmp_path / "toy.flux")
    with pytest.raises(DataError, match=r"toy.flux has no tokenizer"):
        open_subject(tmp_path / "toy.flux", "cpu")


def test_samples_belong_to_one_model(subject: FluxSubject) -> None:
    assert Store(None, subject.digest).key("x") != Store(None, canonical_digest("other")).key("x")
