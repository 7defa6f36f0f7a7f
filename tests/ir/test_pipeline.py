"""Order of passes, what a run reports, dumps and verification from outside."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import ClassVar

import pytest

import fluxc.passes
from fluxc.errors import InternalError, StorageError, VerifierError
from fluxc.ir.observers import Dump, Verify
from fluxc.ir.pass_base import Pass
from fluxc.ir.pipeline import Pipeline, order_faults
from fluxc.ir.printer import program_text
from fluxc.passes import ORDER, lower_pipeline, route_pipeline
from fluxc.passes.apply_plan import ApplyPlan
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.insert_routers import InsertRouters
from fluxc.passes.route_attention import RouteAttention
from fluxc.testing import ToyConfig


@dataclasses.dataclass(frozen=True)
class Breaking(Pass):
    """Erases the head of a program's layer index: a pass with a bug."""

    name: ClassVar[str] = "breaking"

    def rewrite(self, draft, notes):
        for node in draft.graph.nodes:
            if "scale" in node.kwargs:
                node.kwargs = {**node.kwargs, "scale": -1.0}
        return 1


def _classes():
    """Every pass class by its name, from the files of the folder."""
    found = {}
    for path in Path(fluxc.passes.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"fluxc.passes.{path.stem}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        found.update({value.name: path.stem for value in own if isinstance(getattr(value, "name", None), str)})
    return found


def test_order_names_every_pass_once():
    assert sorted(ORDER) == sorted(_classes())
    assert all(stem.replace("_", "-") == name for name, stem in _classes().items())


def test_order_keeps_what_each_pass_asks_for():
    for name, stem in _classes().items():
        module = importlib.import_module(f"fluxc.passes.{stem}")
        owner = next(value for value in vars(module).values() if getattr(value, "name", None) == name)
        after = getattr(owner, "runs_after", ())
        assert set(after) <= set(ORDER)
        assert all(ORDER.index(earlier) < ORDER.index(name) for earlier in after)


def test_wrong_order_is_refused_with_all_faults():
    passes = [ApplyPlan(), RouteAttention(), InsertRouters(), DeadCode(), DeadCode()]
    with pytest.raises(InternalError) as caught:
        Pipeline(passes)
    assert "dead-code stands in it twice" in str(caught.value)
    assert "apply-plan must come after route-attention" in str(caught.value)
    assert "route-attention must come after insert-routers" in str(caught.value)
    assert order_faults([InsertRouters(), RouteAttention(), ApplyPlan()]) == []


def test_run_reports_counts_times_and_stage(toy):
    result = route_pipeline().run(toy(ToyConfig(windows=(0, 6, 0))), "captured")
    assert [(step.index, step.name, step.count) for step in result.steps] == [
        (1, "insert-routers", 2),
        (2, "route-attention", 2),
        (3, "dead-code", 0),
    ]
    assert result.stage == "routed"
    assert all(step.seconds > 0 for step in result.steps)
    assert result.count("insert-routers") == 2
    assert result.report()[0]["notes"][0]["reason"] == "has a window of its own, 6 tokens"
    assert lower_pipeline().run(result.program, result.stage).stage == "lowered"


def test_nothing_to_do_keeps_stage_and_program(toy):
    program = toy(ToyConfig(windows=(6,)))
    result = route_pipeline().run(program, "captured")
    assert result.program is program
    assert result.stage == "captured"


def test_options_reach_the_passes(toy):
    from fluxc.ir.sparse import SparseSettings

    result = route_pipeline(pool=7, sparse=SparseSettings(sink=1, window=2)).run(toy(ToyConfig(windows=(0,))))
    text = program_text(result.program)
    assert "pool=7" in text
    assert "sink=1, window=2" in text


def test_dumps_are_numbered(toy, tmp_path):
    program = toy(ToyConfig(windows=(0,)))
    result = route_pipeline(dump_dir=tmp_path / "dumps").run(program, "captured")
    names = sorted(path.name for path in (tmp_path / "dumps").iterdir())
    assert names == [
        "00.input.txt",
        "01.insert-routers.after.txt",
        "02.route-attention.after.txt",
        "03.dead-code.after.txt",
    ]
    assert (tmp_path / "dumps" / names[0]).read_text() == program_text(program)
    assert (tmp_path / "dumps" / names[2]).read_text() == program_text(result.program)


def test_dump_numbers_run_on(toy, tmp_path):
    dump = Dump(tmp_path)
    first = Pipeline([InsertRouters()], [dump]).run(toy(ToyConfig(windows=(0,))))
    Pipeline([RouteAttention()], [dump]).run(first.program)
    assert [path.name[:2] for path in sorted(tmp_path.iterdir())] == ["00", "01", "02", "03"]


def test_dump_that_cannot_be_written(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        Pipeline([InsertRouters()], [Dump(tmp_path / "file")]).run(toy(ToyConfig(windows=(0,))))


def test_a_bug_is_found_after_the_pass_that_made_it(toy, tmp_path):
    pipeline = Pipeline([Breaking()], [Dump(tmp_path), Verify()])
    with pytest.raises(VerifierError, match="after breaking: node attention has scale"):
        pipeline.run(toy(ToyConfig(windows=(0,))), "captured")
    assert (tmp_path / "01.breaking.after.txt").exists()


def test_an_invalid_input_is_found_before_the_first_pass(toy_routed):
    with pytest.raises(VerifierError, match="not a valid captured program: inputs are"):
        route_pipeline().run(toy_routed(ToyConfig(windows=(0,))), "captured")
