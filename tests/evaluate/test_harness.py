"""The harness's model `fluxc`: equal to the harness's own `hf` when all routes are full, and to `fluxc eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="`pip install 'fluxc[eval]'` brings the harness")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from fluxc.calibrate.runner import forced
from fluxc.data import HELDOUT, generate
from fluxc.errors import OptionError
from fluxc.evaluate.harness import FluxLM
from fluxc.evaluate.subjects import FluxSubject

TEXT = "The moon is bright and the water is cold. The old house stands at the end of the road, and nobody knows. "
PAIRS = [(TEXT * 6, " the end of the road"), (TEXT * 3, " and"), ("", "The moon is bright."), (TEXT * 8 + " ", "a b")]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=at) for at, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(pretrained=str(folder / "tiny"), device="cpu", dtype="float32", batch_size=1, max_length=300)


@pytest.fixture(scope="module")
def full(folder: Path) -> FluxLM:
    return FluxLM(path=str(folder / "tiny.flux"), routes="full", device="cpu", max_length=300)


def test_loglikelihoods_equal_those_of_hf(theirs: HFLM, full: FluxLM) -> None:
    mine = full.loglikelihood(requests("loglikelihood", PAIRS))
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS))
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in expected], abs=2e-4)


def test_rolling_equals_hf_over_several_windows(theirs: HFLM, full: FluxLM) -> None:
    texts = [(TEXT * 20,), ("Short.",)]
    assert len(full.tok_encode(texts[0][0])) > 2 * full.max_length
    mine = full.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert mine == pytest.approx(expected, rel=1e-5)


def test_generation_equals_hf(theirs: HFLM, full: FluxLM) -> None:
    stop = theirs.generate_until(requests("generate_until", [(TEXT * 4, {"until": [], "max_gen_toks": 12})]))[0]
    asked = [
        (TEXT * 4, {"until": [], "max_gen_toks": 12}),
        (TEXT * 4, {"until": [stop[5:8]], "max_gen_toks": 12}),
        (TEXT * 30, {"until": ["zzz"], "max_gen_toks": 5, "do_sample": False}),
    ]
    mine = full.generate_until(requests("generate_until", asked))
    assert mine == theirs.generate_until(requests("generate_until", asked))
    assert len(mine[1]) < len(mine[0])


@pytest.mark.parametrize("routes", ["full", "sparse"])
def test_agrees_with_fluxc_eval_where_tasks_coincide(folder: Path, subject: FluxSubject, routes: str) -> None:
    lm = FluxLM(path=str(folder / "tiny.flux"), routes=routes, device="cpu")
    for prompt in generate(["needle", "kv"], 2, subject.tokenizer, [420], 5, HELDOUT, 4, 96):
        assert prompt.prompt is not None
        pair = (f"{prompt.prompt.text}\n{prompt.prompt.prefix}", prompt.prompt.answer)
        ((value, greedy),) = lm.loglikelihood(requests("loglikelihood", [pair]))
        bias = forced([routes == "full"] * subject.layers)[:, None]
        found = subject.outcomes(prompt, bias)[0]
        assert (value, greedy) == (pytest.approx(-found.loss * prompt.answer_len, rel=1e-5), found.exact)


def test_short_prompts_run_dense_as_when_they_are_served(folder: Path, full: FluxLM) -> None:
    pairs = [(TEXT * 5, " and")]  # more than a sparse row sees, less than the crossover
    flux = str(folder / "tiny.flux")
    expected = full.loglikelihood(requests("loglikelihood", pairs))
    sparse = FluxLM(path=flux, budget=0.0, device="cpu", guard=False).loglikelihood(requests("loglikelihood", pairs))
    served = FluxLM(path=flux, budget=0.0, device="cpu").loglikelihood(requests("loglikelihood", pairs))
    assert served == expected != sparse


def test_a_task_of_the_harness(folder: Path, tmp_path: Path, full: FluxLM, theirs: HFLM) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    docs = [{"question": TEXT * 2, "choices": [" road", " moon", " cold"], "answer": at % 3} for at in range(4)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "docs.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    (tmp_path / "local_choice.yaml").write_text(task)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def accuracy(lm: Any) -> float:
        found = lm_eval.simple_evaluate(lm, tasks=["local_choice"], task_manager=manager, bootstrap_iters=0)
        return float(found["results"]["local_choice"]["acc,none"])

    assert accuracy(full) == accuracy(theirs)


def test_the_command_knows_the_model() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("fluxc") is FluxLM


def test_a_gpu_that_is_not_there_is_the_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert FluxLM(path=str(folder / "tiny.flux"), device="cuda:0").device == torch.device("cpu")


def test_a_model_without_a_plan_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"is no model\.flux and no engine"):
        FluxLM(path=str(folder / "tiny"), device="cpu")
    with pytest.raises(OptionError, match="routes 'half'"):
        FluxLM(path=str(folder / "tiny.flux"), routes="half", device="cpu")
