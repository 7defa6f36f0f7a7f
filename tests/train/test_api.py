"""`fluxc.train` on a model.flux: what changes, what stays, and a run that was cut off."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import fluxc
from fluxc.capture.api import capture
from fluxc.errors import DataError, OptionError, TrainingError
from fluxc.flux_dir import open_flux
from fluxc.ir.graph import runnable
from fluxc.runtime.model import load_flux
from fluxc.tiny_folder import save_tiny_model
from fluxc.toy_flux import flux_of
from fluxc.train import api
from fluxc.train.data import TrainData, balance_warnings
from fluxc.train.log import read_log
from fluxc.train.options import TrainOptions, preset
from fluxc.train.trainer import Trainer

OPTIONS = TrainOptions(
    steps=6, batch=4, save_every=2, router_lr=1e-2, targets={"kv": 0.2, "local": 0.9}, micro_tokens=400
)
WORDS = ["moon", "river", "stone", "cloud", "garden", "winter", "table", "number", "letter", "forest"]


def write_data(path, count=24, tasks=("kv", "local")):
    rng = random.Random(0)
    lines = []
    for index in range(count):
        text = " ".join(rng.choice(WORDS) for _ in range(20 + index % 3))
        entry = {"prompt": f"Code {index}: {text}?", "answer": f" {1000 + index}"}
        lines.append(json.dumps(entry | ({"task": tasks[index % len(tasks)]} if tasks else {})))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    captured = capture(save_tiny_model(folder / "tiny", layers=2, context=512))
    flux_of(folder / "m.flux", captured.program, captured.meta, tokenizer_files=captured.tokenizer_files)
    return folder / "m.flux"


@pytest.fixture
def flux(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "m.flux"))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "mix.jsonl")


def contents(flux):
    return {str(path.relative_to(flux)): path.read_bytes() for path in flux.rglob("*") if path.is_file()}


def left_behind(flux):
    """What a finished run keeps beside the model, TensorBoard's files apart, which are there where it is installed."""
    work = api.work_folder(flux)
    return {path.name for path in work.iterdir()} - {"tensorboard"} if work.exists() else set()


class Notes:
    """Progress that remembers what was said."""

    def __init__(self):
        self.said = []

    def start(self, name, total=None):
        self.said.append(name)

    def advance(self, steps=1):
        pass

    def note(self, text):
        self.said.append(text)


def test_small_files_change_and_nothing_else(flux, data):
    before = contents(flux)
    done = fluxc.train(flux, data=data, options=OPTIONS)
    after = contents(flux)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    small = {"manifest.json", "plan.json", "routers.safetensors"}
    assert changed == small | {"measurements/training.json", "measurements/training.csv"}
    assert open_flux(flux).plan == done.plan
    assert left_behind(flux) == set()
    report = json.loads((flux / "measurements" / "training.json").read_text())
    assert report["data"]["prompts"] == {"train": 18, "curve": 4, "heldout": 2}


def test_the_budget_is_a_knob_after_training(flux, data):
    options = dataclasses.replace(OPTIONS, start="fresh", steps=2)
    plan = fluxc.train(flux, data=data, options=options).plan
    prompts = api.training_data(options, data, load_flux(flux).tokenizer, plan, Notes())
    module = runnable(open_flux(flux).load("routed"))
    shares = []
    for budget in (0.25, 0.5, 0.75):
        bias = torch.tensor(plan.bias(budget))
        shares.append(api.verify(module, prompts.curve, bias).routed["all"].full_share)
    assert shares == sorted(shares)
    assert all(abs(share - budget) <= 0.3 for share, budget in zip(shares, (0.25, 0.5, 0.75), strict=True))
    assert shares[0] < shares[-1]


def test_trained_models_answer(flux, data):
    fluxc.train(flux, data=data, options=OPTIONS)
    model = load_flux(flux)
    found = model.prefill([[5, 6, 7] * 20], program="routed")
    assert found.logits.isfinite().all()


def test_killed_and_resumed_equals_uninterrupted(flux, made, data, tmp_path, monkeypatch):
    whole = Path(shutil.copytree(made, tmp_path / "whole.flux"))
    fluxc.train(whole, data=data, options=OPTIONS)
    real, calls = Trainer.run_step, []

    def interrupted(self):
        calls.append(self.step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self)

    before = contents(flux)
    monkeypatch.setattr(Trainer, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fluxc.train(flux, data=data, options=OPTIONS)
    assert contents(flux) == before
    assert [path.name for path in (api.work_folder(flux) / "checkpoints").iterdir()] == ["step-000003"]
    notes = Notes()
    fluxc.train(flux, data=data, options=OPTIONS, progress=notes)
    assert "going on after step 3" in notes.said
    for name in ("routers.safetensors", "plan.json", "measurements/training.csv"):
        assert (flux / name).read_bytes() == (whole / name).read_bytes()
    assert [int(row["step"]) for row in read_log(flux / "measurements/training.csv") if row["task"] == "all"] == [
        *range(1, 7)
    ]


def test_other_options_do_not_resume(flux, data, monkeypatch):
    real = Trainer.run_step

    def interrupted(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trainer, "run_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fluxc.train(flux, data=data, options=OPTIONS)
    monkeypatch.setattr(Trainer, "run_step", real)
    other = dataclasses.replace(OPTIONS, router_lr=1e-4)
    with pytest.raises(TrainingError, match="another options"):
        fluxc.train(flux, data=data, options=other)
    fluxc.train(flux, data=data, options=other, force=True)
    assert left_behind(flux) == set()


def test_log_has_a_row_for_each_step_and_task(flux, data):
    fluxc.train(flux, data=data, options=OPTIONS)
    rows = read_log(flux / "measurements/training.csv")
    assert {row["task"] for row in rows} == {"all", "kv", "local"}
    assert {row["target"] for row in rows if row["task"] == "kv"} == {"0.20000000298023224"}
    assert all(float(row["padding"]) <= 0.1 for row in rows if row["task"] == "all")


def test_tensorboard_shows_every_step(flux, data):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fluxc.train(flux, data=data, options=OPTIONS)
    events = EventAccumulator(str(api.work_folder(flux) / "tensorboard"))
    events.Reload()
    assert {"all/loss", "all/tau", "kv/omega", "kv/lambda1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("all/loss")] == list(range(1, 7))


def test_bf16_keeps_the_model_files(flux, data):
    done = fluxc.train(flux, data=data, options=dataclasses.replace(OPTIONS, dtype="bfloat16", steps=2))
    assert open_flux(flux).plan.model.dtype == done.plan.model.dtype == "float32"
    assert {tensor.dtype for tensor in open_flux(flux).routers.values()} == {torch.float32}


def test_data_without_tasks(flux, tmp_path):
    data = write_data(tmp_path / "plain.jsonl", tasks=())
    done = fluxc.train(flux, data=data, options=dataclasses.replace(OPTIONS, steps=1))
    assert done.report["last"]["tasks"]["user"]["target"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"targets": {"kv": 0.5}}, DataError, "'summary' .* has no target"),
        ({"tasks": ("kv",), "count": 5}, DataError, "holds 5 prompts"),
    ],
)
def test_bad_data(flux, tmp_path, change, error, said):
    tasks = change.pop("tasks", ("kv", "summary"))
    data = write_data(tmp_path / "bad.jsonl", change.pop("count", 24), tasks)
    before = contents(flux)
    with pytest.raises(error, match=said):
        fluxc.train(flux, data=data, options=dataclasses.replace(OPTIONS, **change))
    assert contents(flux) == before


def test_a_folder_without_datasets_says_what_is_missing(flux, tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"fluxc\[train\]|save_to_disk"):
        fluxc.train(flux, data=tmp_path / "rows", options=OPTIONS)


def test_datasets_folder_equals_jsonl(flux, data, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    pyarrow = pytest.importorskip("pyarrow")
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows))
    # With a fingerprint given, datasets does not have to pickle pyarrow's types to make one.
    datasets.Dataset(table, fingerprint="0" * 16).save_to_disk(str(tmp_path / "rows"))
    model = load_flux(flux)
    found = [
        api.training_data(OPTIONS, path, model.tokenizer, model.plan, Notes()) for path in (data, tmp_path / "rows")
    ]
    assert found[0].digest() == found[1].digest()


def test_generated_data_are_seeded_and_of_other_seeds(flux):
    model = load_flux(flux)
    plan = dataclasses.replace(
        model.plan, layers=[dataclasses.replace(p, sink=4, window=60) for p in model.plan.layers]
    )
    options = TrainOptions(prompts=6, length=400)
    first, second = (api.training_data(options, None, model.tokenizer, plan, Notes()) for _ in range(2))
    assert isinstance(first, TrainData)
    assert first.digest() == second.digest()
    assert len(first.train) == 6
    assert len({tuple(p.input_ids) for p in (*first.train, *first.curve, *first.heldout)}) == 18


def test_unbalanced_tasks_are_warned_about(flux, tmp_path):
    data = write_data(tmp_path / "mix.jsonl", 24, ("kv", "kv", "kv", "local"))
    notes = Notes()
    model = load_flux(flux)
    found = api.training_data(OPTIONS, data, model.tokenizer, model.plan, notes)
    assert any(line.startswith("unbalanced tasks") for line in notes.said)
    assert balance_warnings([p for p in found.train if p.task == "kv"]) == []


def test_budget_without_a_route_left(flux, data):
    fluxc.calibrate(flux, budget=1)
    with pytest.raises(OptionError, match="at budget 1 no route is left"):
        fluxc.train(flux, data=data, options=OPTIONS)


def test_presets():
    paper = preset("paper")
    assert (paper.steps, paper.batch, paper.router_lr, paper.multiplier_lr) == (300, 48, 5e-4, 1e-3)
    assert (paper.weight_decay, paper.warmup, paper.start, paper.length) == (0.1, 0.2, "fresh", 65536)
    assert (paper.target_of("kv", 0.4), paper.target_of("code", 0.4)) == (0.45, 1.0)
    assert preset("fast", steps=7) == TrainOptions(steps=7)
    with pytest.raises(OptionError, match="unknown preset"):
        preset("slow")
    with pytest.raises(OptionError, match="steps is 0"):
        preset("fast", steps=0)
