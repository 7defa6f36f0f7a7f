"""Target aoti: programs in pieces, what is refused, and (slow: minutes of C++ compiler) real packages."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.fx import GraphModule

import fluxc
from fluxc.cli import main
from fluxc.errors import ArchiveError, BuilderError, OptionError, StorageError, TargetError
from fluxc.exporters import aoti, aoti_compile, aoti_programs, machine, piece_programs
from fluxc.exporters.aoti_phases import phases_of
from fluxc.exporters.aoti_pieces import fingerprint
from fluxc.exporters.aoti_recipe import Recipe
from fluxc.exporters.aoti_run import AotiProgram
from fluxc.exporters.engine_dir import open_engine
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.toy_decoder import ToyConfig, toy_program
from fluxc.toy_flux import TOY, toy_flux, toy_routed

FOUR = ToyConfig(windows=(0, 16, 0, 0))


@pytest.fixture(scope="module")
def routed():
    """Three layers that are alike, apart from their weights, and one that is not."""
    program = toy_routed(toy_program(FOUR))
    generator = torch.Generator().manual_seed(0)
    for weight in program.state_dict.values():
        weight.data.add_(torch.rand(weight.shape, generator=generator) * 0.1)
    return program


@pytest.fixture(scope="module")
def phases(routed):
    return phases_of(routed)


def eager(made, routed):
    """The program run as `aoti_run` does, its pieces not compiled."""
    tensors = {**routed.constants, **routed.state_dict}

    def piece(call):
        module = made.modules[call.piece]
        held = {node.target: getattr(module, node.target) for node in module.graph.nodes if node.op == "get_attr"}
        whole = GraphModule(held | {name: tensors[weight] for name, weight in call.weights.items()}, module.graph)
        return lambda values: whole(*values)

    return AotiProgram(made.recipe, [piece(call) for call in made.recipe.calls])


def inputs(length, biases):
    ids = torch.randint(0, FOUR.vocab, (1, length), generator=torch.Generator().manual_seed(length))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(length)[None],
        "seq_lens": torch.tensor([length]),
        "prompt_lens": torch.tensor([length]),
        "route_bias": torch.tensor(biases)[:, None],
        "logits_at": torch.tensor([[0, length - 1]]),
    }


@pytest.mark.parametrize("biases", [[torch.inf] * 3, [-torch.inf] * 3, [0.0, torch.inf, -torch.inf]])
@torch.no_grad()
def test_the_pieces_are_the_program(routed, phases, biases):
    for length in (1, 17, 40):
        given = inputs(length, biases)
        found = eager(phases["prefill"].cut, routed)(given)
        logits, routes, scores = runnable(routed)(*given.values())
        assert torch.equal(found["logits"], logits)
        assert torch.equal(found["routes"], routes)
        assert torch.equal(found["scores"], scores)
        assert [bool(found[f"route_{row}"]) for row in range(3)] == routes[:, 0].tolist()


@pytest.mark.parametrize("phase", ["prefill", "decode", "append"])
def test_layers_that_are_alike_are_one_piece(phases, phase):
    recipe = phases[phase].cut.recipe
    pieces = [call.piece for call in recipe.calls]
    prefill = ["layer_0000", "layer_0001", "layer_0000", "layer_0000"]
    assert pieces == ["prologue", *(prefill if phase == "prefill" else ["layer_0000"] * 4), "epilogue"]
    assert phases[phase].cut.shared == {"layer_0000"}
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_another_constant_is_another_piece(routed, phases):
    other = ApplyPlan({2: SparseSettings(sink=4, window=11)}).apply(routed).program
    assert len(phases_of(other)["prefill"].cut.modules) == len(phases["prefill"].cut.modules) + 1
    texts = [fingerprint(module) for module in phases["prefill"].cut.modules.values()]
    assert len(set(texts)) == len(texts)


def test_conditionals_are_in_prefill_alone_and_every_op_exists_in_cpp(phases):
    aoti.check_phases(phases, 3)
    assert aoti.our_ops(phases["prefill"].cut.modules) == {"attention", "streaming_attention", "router_pool"}
    assert aoti.our_ops(phases["decode"].cut.modules) == {"kv_write", "decode_attention"}
    assert aoti.our_ops(phases["append"].cut.modules) == {"kv_write", "append_attention"}
    with pytest.raises(fluxc.errors.InternalError, match="prefill has 3 conditionals, 4 layers"):
        aoti.check_phases(phases, 4)


def test_a_piece_of_several_layers_holds_the_weights_of_none(phases):
    made = phases["prefill"].cut
    module = made.modules["layer_0000"]
    alone = piece_programs.export_piece(module, with_stand_ins=True)
    own = [
        t for t in (getattr(module, n.target) for n in module.graph.nodes if n.op == "get_attr") if torch.is_tensor(t)
    ]
    held = list(alone.state_dict.values())
    assert [t.shape for t in held] == [t.shape for t in own]
    assert not any(torch.equal(one, other) for one, other in zip(held, own, strict=True))


def test_what_cannot_be_built_is_said_before_any_work(monkeypatch):
    program = toy_routed(toy_program(TOY))
    aoti.check(program)
    blocks = SparseSettings("block", decode_full=True, block=16, stride=4, threshold=0.9)
    with pytest.raises(TargetError, match="layer 0 has the sparse kind block"):
        aoti.check(ApplyPlan({0: blocks, 2: blocks}).apply(program).program)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(aoti.shutil, "which", lambda name: None)
    with pytest.raises(TargetError, match="needs a C\\+\\+ compiler"):
        aoti.check(program)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (CppCompileError(["g++"], "first\nerror: no such thing"), BuilderError, "last lines: .*no such thing"),
        (CppCompileError(["g++"], "g++: fatal error: Killed signal terminated cc1plus"), BuilderError, "out of memory"),
        (CppCompileError(["g++"], "cannot write: No space left on device"), StorageError, "ran out of space"),
        (InvalidCxxCompiler(), TargetError, "C\\+\\+ compiler"),
    ],
)
def test_a_compiler_that_fails(tmp_path, capsys, monkeypatch, error, kind, said):
    def fail(program, folder):
        raise RuntimeError("torch wraps it") from error

    flux = toy_flux(tmp_path / "toy.flux")
    monkeypatch.setattr(aoti_compile, "_compile", fail)
    with pytest.raises(kind, match=said):
        fluxc.export(flux.path, target="aoti", output=tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.flux"]
    if kind is BuilderError:
        assert main(["export", str(flux.path), "--target", "aoti", "-o", str(tmp_path / "engine")]) == 1
        assert "error: the C++ compiler failed" in capsys.readouterr().err


def test_engines_of_other_machines(tmp_path):
    here = machine.this_machine()
    machine.check_machine(here, tmp_path)
    with pytest.raises(TargetError, match="was built for a processor with quantum"):
        machine.check_machine(here | {"instructions": here["instructions"] + " quantum"}, tmp_path)
    with pytest.raises(TargetError, match="was built for s390x"):
        machine.check_machine(here | {"architecture": "s390x"}, tmp_path)
    with pytest.raises(TargetError, match=r"was built for torch 2\.1, this is torch 2\.13\.0"):
        machine.check_torch("2.1", "2.13.0", tmp_path)
    with pytest.raises(ArchiveError, match="which machine"):
        machine.check_machine({}, tmp_path)


def test_wrong_recipes(tmp_path):
    for text in (
        "",
        "[]",
        "{}",
        '{"machine": {}, "programs": {"prefill": {"file": "x"}}}',
        '{"machine": 1, "programs": []}',
    ):
        (tmp_path / aoti_programs.RECIPES).write_text(text)
        with pytest.raises(ArchiveError):
            aoti_programs.open_programs(tmp_path, torch.device("cpu"), torch.__version__)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aoti")
    flux = toy_flux(folder / "toy.flux")
    return flux, fluxc.export(flux.path, target="aoti", output=folder / "engine")


def ids(count, seed):
    return random.Random(seed).choices(range(2, TOY.vocab), k=count)


@pytest.mark.slow
def test_an_engine_answers_as_the_model_does(made):
    flux, exported = made
    assert max(exported.report["verified"][name] for name in ("prefill", "decode")) < 1e-5
    prompts = [ids(length, length) for length in (1, 40, 90)]
    found = []
    for path in (flux.path, exported.path):
        with fluxc.load(path, "cpu") as engine:
            engine.scheduler.runner.store.cache.fill_(torch.nan)
            answers = engine.generate(prompts, max_new_tokens=12, budget=[0.2, 0.5, 1.0])
            talk = engine.conversation()
            turns = [engine.generate(ids(20, turn), conversation=talk, max_new_tokens=6) for turn in range(2)]
            found.append([(one.tokens, one.routes.tolist()) for one in (*answers, *turns)])
            talk.close()
    assert found[0] == found[1]


@pytest.mark.slow
def test_long_prompts_are_the_same(made):
    flux, exported = made
    routed, own = flux.load("routed"), aoti.phases(exported.path)
    for length in (1000, 4096):
        for bias in (torch.inf, -torch.inf, 0.0):
            given = inputs(length, [bias] * 2)
            with torch.no_grad():
                logits, routes, _ = runnable(routed)(*given.values())
            found = own.prefill(given["input_ids"], given["route_bias"], given["logits_at"])
            assert torch.equal(found["routes"], routes)
            torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_only_the_chosen_branch_runs(made):
    own = aoti.phases(made[1].path)
    for bias, ran, other in ((torch.inf, "attention", "streaming_attention"), (-torch.inf, "streaming_attention", "")):
        given = inputs(64, [bias] * 2)
        with torch.profiler.profile() as profile:
            own.prefill(given["input_ids"], given["route_bias"], given["logits_at"])
        names = [event.name for event in profile.events()]
        assert names.count(f"fluxc::{ran}") >= 2
        assert names.count(f"fluxc::{other}") == 0
        assert names.count("fluxc::attention") == (3 if bias > 0 else 1)  # one layer has a window of its own


@pytest.mark.slow
def test_weights_are_stored_once_and_budgets_change_the_plan_only(made, tmp_path):
    flux, exported = made
    path = shutil.copytree(exported.path, tmp_path / "engine")
    stored = sum(t.nbytes for t in (*flux.weights.values(), *flux.routers.values()))
    assert sum(file.stat().st_size for file in (path / "weights").iterdir()) <= 1.15 * stored
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert main(["calibrate", str(path), "--budget", "0.8"]) == 0
    changed = {file.name for file, content in before.items() if file.read_bytes() != content}
    assert changed == {"plan.json", "engine.json"}
    assert open_engine(path).plan.budget == 0.8


@pytest.mark.slow
def test_damaged_packages_are_not_opened(made, tmp_path):
    path = shutil.copytree(made[1].path, tmp_path / "engine")
    with pytest.raises(OptionError, match="runs on cpu, not on cuda"):
        fluxc.load(path, "cuda")
    chosen = random.Random(0)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "engine.json"]
    for file in files * 5:
        content = file.read_bytes()
        at = chosen.randrange(len(content))
        flipped = content[:at] + bytes([content[at] ^ 1 << chosen.randrange(8)]) + content[at + 1 :]
        file.write_bytes(chosen.choice([flipped, content[:at]]))
        with pytest.raises(ArchiveError, match="is damaged"):
            fluxc.load(path)
        file.write_bytes(content)
    with fluxc.load(path) as engine:
        assert engine.generate(ids(5, 0), max_new_tokens=2).tokens
