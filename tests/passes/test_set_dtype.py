"""Pass set-dtype: a capture set to another dtype equals a capture in that dtype, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxc
from fluxc.archive import load_program, save_program
from fluxc.capture.casts import class_casts
from fluxc.capture.result import Capture
from fluxc.errors import CaptureError, OptionError
from fluxc.ir.graph import runnable
from fluxc.ir.printer import program_diff, program_text
from fluxc.passes.drop_asserts import DropAsserts
from fluxc.passes.set_dtype import CAST, SetDtype, custom
from fluxc.testing import TINY_FAMILIES
from fluxc.tiny_models import VOCAB

# Norms in fp32 (all), a constant and soft caps (gemma2), experts and sinks (gpt-oss), layer norms and learned
# positions (opt), q-norms over all heads (olmo2).
FAMILIES = ("llama", "gemma2", "olmo2", "gpt-oss", "opt")
MORE = sorted(set(TINY_FAMILIES) - set(FAMILIES))


@functools.cache
def captured(name: str) -> Capture:
    return fluxc.capture(TINY_FAMILIES[name]())


def reloaded(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model as users load it in another dtype: RoPE frequencies stay fp32, unlike under `model.to(dtype)`."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def run(program: torch.export.ExportedProgram) -> torch.Tensor:
    ids = torch.arange(42).reshape(2, 21) % VOCAB
    positions = torch.arange(21).expand(2, 21).contiguous()
    with torch.no_grad():
        return runnable(program)(ids, positions, torch.tensor([21, 21]), positions)


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_equals_a_capture_in_that_dtype(name: str, tmp_path: Path) -> None:
    native = fluxc.capture(reloaded(TINY_FAMILIES[name](), tmp_path, torch.bfloat16)).program
    result = SetDtype("bfloat16").apply(captured(name).program)
    assert result.modified
    assert program_text(result.program) == program_text(native)
    assert run(result.program).dtype == torch.bfloat16
    assert torch.equal(run(result.program), run(native))


def test_fp16_and_the_way_back(tmp_path: Path) -> None:
    half = fluxc.capture(reloaded(TINY_FAMILIES["gemma2"](), tmp_path, torch.float16)).program
    assert torch.equal(run(SetDtype("fp16").apply(captured("gemma2").program).program), run(half))
    full = fluxc.capture(reloaded(TINY_FAMILIES["gemma2"](), tmp_path, torch.float16).float()).program
    assert torch.equal(run(SetDtype("float32").apply(half).program), run(full))


def test_marks_survive_save_and_load(tmp_path: Path) -> None:
    save_program(captured("gemma2").program, tmp_path / "model.pt")
    program, _ = load_program(tmp_path / "model.pt")
    here, there = (SetDtype("bfloat16").apply(p).program for p in (captured("gemma2").program, program))
    assert program_text(here) == program_text(there)
    assert torch.equal(run(here), run(there))


class Normed(torch.nn.Module):
    """A norm in fp32 and a table of positions: casts up, casts back and a buffer that stays fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.embed = torch.nn.Parameter(torch.randn(8, 4).bfloat16())
        self.frequencies = torch.nn.Buffer(torch.ones(4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.embedding(ids, self.embed)
        wide = hidden.to(torch.float32)
        normed = self.scale * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(hidden.dtype)
        return normed * (ids[..., None].float() * self.frequencies.float()).cos().to(hidden.dtype)


def test_golden(golden) -> None:
    exported = DropAsserts().apply(torch.export.export(Normed(), (torch.arange(3),))).program
    program = class_casts(exported, torch.bfloat16)
    golden.check("normed", program_diff(program, SetDtype("float32").apply(program).program))


def test_only_rope_frequencies_keep_their_dtype() -> None:
    program = SetDtype("bfloat16").apply(captured("llama").program).program
    tensors = {**program.state_dict, **program.constants}
    assert {n for n, t in tensors.items() if t.dtype == torch.float32} == {"model.rotary_emb.inv_freq"}


def test_capture_takes_a_dtype() -> None:
    again = fluxc.capture(TINY_FAMILIES["llama"](), dtype="bf16")
    assert again.meta["dtype"] == "bfloat16"
    assert program_text(again.program) == program_text(SetDtype("bfloat16").apply(captured("llama").program).program)


def test_same_dtype_changes_nothing() -> None:
    program = captured("llama").program
    result = SetDtype("float32").apply(program)
    assert (result.count, result.modified, result.program is program) == (0, False, True)


def test_cast_without_a_class_is_refused() -> None:
    from fluxc.ir.graph import Draft

    draft = Draft(captured("llama").program)
    cast = next(node for node in draft.graph.nodes if CAST in custom(node))
    cast.meta["custom"] = {}
    with pytest.raises(CaptureError, match=f"node {cast.name} casts to torch.float32"):
        SetDtype("bfloat16").apply(draft.close())


def test_unknown_dtype() -> None:
    with pytest.raises(OptionError, match="'int8' is not a model dtype"):
        SetDtype("int8").apply(captured("llama").program)


def test_input_program_is_unchanged() -> None:
    program = captured("llama").program
    before = program_text(program)
    SetDtype("bfloat16").apply(program)
    assert program_text(program) == before
    assert {t.dtype for t in program.state_dict.values()} == {torch.float32}
