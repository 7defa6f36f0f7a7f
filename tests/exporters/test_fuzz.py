"""Bytes of an engine that are flipped or cut give clean errors, whatever file they are in."""

from __future__ import annotations

import json
import random
import shutil

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import fluxc
from fluxc.errors import UserError
from fluxc.exporters.engine_dir import NAME, open_engine

FILES = ["prefill.onnx", "decode.onnx", "weights.bin", "plan.json", "README.md", "tokenizer/tokenizer.json", NAME]


def damaged(content, rng):
    """The bytes with some of them flipped, cut off, or put in."""
    kind, at = rng.choice(["flip", "cut", "insert", "swap"]), rng.randrange(len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "insert":
        return content[:at] + rng.randbytes(1 + rng.randrange(9)) + content[at:]
    end = min(len(content), at + 1 + rng.randrange(50))
    return content[:at] + rng.randbytes(end - at) + content[end:]


@pytest.fixture
def engine(made, tmp_path):
    return shutil.copytree(made[1].path, tmp_path / "engine")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rounds", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused(engine, name, rounds):
    """Every change is noticed, but for one in the manifest that means nothing (a figure of what was verified)."""
    whole, rng = (engine / name).read_bytes(), random.Random(rounds)
    for _ in range(rounds):
        content = damaged(whole, rng)
        if content == whole:
            continue
        (engine / name).write_bytes(content)
        try:
            open_engine(engine)
        except UserError as error:
            assert str(error)
        else:
            assert name == NAME


@pytest.mark.parametrize("rounds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_values_of_a_manifest_that_are_not_what_they_should_be(engine, rounds):
    """Opening and loading raise errors of the user's kind, or the value did not matter."""
    whole, rng = json.loads((engine / NAME).read_text()), random.Random(rounds)
    strange = [None, -1, 10**30, "x", [], {}, True, 1.5, ["x"], {"x": 1}]
    for _ in range(rounds):
        values = json.loads(json.dumps(whole))
        key = rng.choice([key for key in values if key not in ("meta", "versions", "verified")])
        values[key] = rng.choice(strange)
        (engine / NAME).write_text(json.dumps(values))
        try:
            with fluxc.load(engine, kv_memory=1_000_000) as found:
                found.generate([3], max_new_tokens=1)
        except UserError as error:
            assert str(error)
