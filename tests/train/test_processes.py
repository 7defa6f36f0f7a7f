"""Two processes over gloo: the loss curve and the weights of one process at the same global batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fluxc.capture.api import capture
from fluxc.flux_dir import open_flux
from fluxc.tiny_folder import save_tiny_model
from fluxc.toy_flux import flux_of

PROGRAM = """
import dataclasses, json, random, sys
import torch
from safetensors.torch import save_file
from torch import distributed
from fluxc.data import TokenizedPrompt
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.route_attention import RouteAttention
from fluxc.testing import toy_program
from fluxc.train.options import TrainOptions
from fluxc.train.program import soften
from fluxc.train.trainer import Trainer

rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
rng = random.Random(0)
prompts = [
    TokenizedPrompt([rng.randrange(32) for _ in range(24 - i % 3)], 20 - i % 3, ("kv", "local")[i % 2])
    for i in range(10)
]
scored = InsertRouters().apply(toy_program()).program
routed = RouteAttention(SparseSettings(sink=2, window=4)).apply(scored).program
options = TrainOptions(steps=8, batch=5, router_lr=3e-3, micro_tokens=int(sys.argv[5]))
trainer = Trainer(soften(routed), prompts, torch.tensor([-4.0, -4.5]), {"kv": 0.3, "local": 0.9}, options)
records = [dataclasses.asdict(trainer.run_step()) for _ in range(8)]
if rank == 0:
    save_file(trainer.program.trained(), out + ".safetensors")
    open(out + ".json", "w").write(json.dumps(records))
if world > 1:
    distributed.destroy_process_group()
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(world: int, out: Path, micro_tokens: int) -> tuple[list[dict], dict]:
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(rank), str(world), port, str(out), str(micro_tokens)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    for process in started:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    return json.loads(out.with_suffix(".json").read_text()), load_file(out.with_suffix(".safetensors"))


def test_two_processes_train_as_one(tmp_path):
    # Five prompts a step: one process has three of them, the other two.
    (one, alone), (two, together) = (run(world, tmp_path / f"w{world}", 10**6) for world in (1, 2))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["omega"] == pytest.approx(theirs["omega"], abs=1e-5)
        assert {task: row["prompts"] for task, row in mine["tasks"].items()} == {
            task: row["prompts"] for task, row in theirs["tasks"].items()
        }
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)


def test_processes_with_unequal_numbers_of_micro_batches_end_together(tmp_path):
    records, _ = run(2, tmp_path / "cut", 30)
    assert len(records) == 8
    assert all(sum(row["prompts"] for row in record["tasks"].values()) == 5 for record in records)


@pytest.mark.slow
def test_the_command_under_a_launcher(tmp_path):
    """As torchrun starts it: environment variables, one command a process; the first writes and speaks."""
    folder = tmp_path / "tiny"
    captured = capture(save_tiny_model(folder, layers=2, context=512))
    rows = [
        {"prompt": f"Code {n}: {'moon river ' * 8}{n}?", "answer": f" {n}", "task": ("kv", "local")[n % 2]}
        for n in range(24)
    ]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    routers = []
    for world in (1, 2):
        flux = tmp_path / f"w{world}.flux"
        flux_of(flux, captured.program, captured.meta, tokenizer_files=captured.tokenizer_files)
        said = launch(world, "train", str(flux), "--data", str(tmp_path / "mix.jsonl"), "--steps", "3", "--batch", "4")
        assert [text.count("trained ") for text in said] == [1, *[0] * (world - 1)]
        assert not (flux.with_name(flux.name + ".training") / "checkpoints").exists()
        routers.append(open_flux(flux).routers)
    for name, tensor in routers[0].items():
        torch.testing.assert_close(routers[1][name], tensor, rtol=1e-4, atol=1e-5)


def launch(world, *argv):
    port = str(free_port())
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "fluxc", *argv, "--device", "cpu"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0] * world, outputs
    return [out for out, _ in outputs]
