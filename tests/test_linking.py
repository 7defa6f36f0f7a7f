"""model.flux directories that refer to the weights of their source by hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxc.artifact import open_flux
from fluxc.capture.api import capture
from fluxc.errors import ArchiveError, SourceError
from fluxc.ir.graph import runnable
from fluxc.linking import Links, link_weights, source_files
from fluxc.runtime.model import load_flux
from fluxc.testing import TINY_FAMILIES, toy_inputs
from fluxc.toy_flux import flux_of, toy_flux


@pytest.fixture(scope="module")
def toy(toy):
    return toy()


@pytest.fixture
def source(toy, tmp_path):
    """The toy's weights under other names: one is missing, one differs."""
    state = {f"model.{name}": tensor.detach().clone() for name, tensor in toy.state_dict.items()}
    del state["model.layers.0.down.weight"]
    state["model.head.weight"] += 1
    save_file(state, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def linked(path: Path, program, files) -> object:
    return toy_flux(path, program, links=Links.to(program.state_dict, files))


def change(file: Path) -> None:
    """Flip the last bit of a file of weights: dtypes and shapes stay."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_tensors_are_found_by_their_bytes_and_the_rest_is_copied(toy, source, tmp_path):
    flux = linked(tmp_path / "model.flux", toy, [source])
    assert set(load_file(flux.path / "weights" / "model-00001.safetensors")) == {"layers.0.down.weight", "head.weight"}
    assert set(flux.manifest.links) == {str(source)}
    assert torch.equal(runnable(flux.load("captured"))(*toy_inputs()), runnable(toy)(*toy_inputs()))


def test_a_source_that_changed_or_went_away_is_named(toy, source, tmp_path):
    flux = linked(tmp_path / "model.flux", toy, [source])
    change(source)
    with pytest.raises(ArchiveError, match=r"source\.safetensors has changed since .*model\.flux was linked to it"):
        load_flux(flux.path)
    source.unlink()
    with pytest.raises(ArchiveError, match=r"source\.safetensors is missing. .*model\.flux has its weights there"):
        open_flux(flux.path)


def test_a_source_that_changes_before_the_links_are_written_leaves_nothing(toy, source, tmp_path):
    links = Links.to(toy.state_dict, [source])
    change(source)
    with pytest.raises(ArchiveError, match="has changed while it was linked to"):
        toy_flux(tmp_path / "model.flux", toy, links=links)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_files_that_cannot_be_read_are_refused(toy, tmp_path):
    (tmp_path / "source.safetensors").write_text("no tensors")
    for name in ("source.safetensors", "none.safetensors"):
        with pytest.raises(ArchiveError, match=name):
            Links.to(toy.state_dict, [tmp_path / name])


def folder_of(path: Path, family: str, shards: str = "1GB", **fields) -> Path:
    TINY_FAMILIES[family](**fields).save_pretrained(path, max_shard_size=shards)
    return path


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_hugging_face_folder_is_linked_whole(tmp_path, shards):
    folder = folder_of(tmp_path / "llama", "llama", shards)
    captured = capture(folder)
    files = source_files(folder)
    assert len(files) == 1 if shards == "1GB" else len(files) > 2
    links = link_weights(captured.program, files)
    made = flux_of(tmp_path / "llama.flux", captured.program, captured.meta, links=links)
    assert not list((made.path / "weights").iterdir())
    assert set(made.manifest.links) == {str(file) for file in files}
    tokens = torch.randint(90, (2, 7))
    inputs = (tokens, torch.arange(7).expand(2, -1), torch.tensor([7, 7]), torch.arange(7).expand(2, -1))
    assert torch.equal(runnable(made.load("captured"))(*inputs), runnable(captured.program)(*inputs))


def test_another_dtype_is_refused(tmp_path):
    folder = folder_of(tmp_path / "llama", "llama")
    captured = capture(folder, dtype="bfloat16")
    with pytest.raises(SourceError, match=r"tensors are not stored in .*llama as they are used \(.*, bfloat16"):
        link_weights(captured.program, source_files(folder))


def test_experts_that_are_merged_when_loaded_are_refused(tmp_path):
    folder = folder_of(tmp_path / "moe", "qwen3-moe")
    with pytest.raises(SourceError, match=r"experts.* converted, merged or split. leave --link out"):
        link_weights(capture(folder).program, source_files(folder))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.pt", "model.pt holds its weights inside"),
        ("model.gguf", "is a GGUF file: its weights are converted"),
        ("owner/name", "owner/name is a hub id"),
        ("pickled", "pickled holds no model.safetensors"),
        ("broken", "model.safetensors.index.json is no index"),
        ("missing", "there is no model 'missing'"),
    ],
)
def test_models_that_cannot_be_linked_to(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    Path("model.pt").touch()
    Path("model.gguf").write_bytes(b"GGUF")
    for folder in ("pickled", "broken"):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
    Path("broken/model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(SourceError, match=reason):
        source_files(name)


def test_a_module_has_no_files():
    with pytest.raises(SourceError, match="a Linear in memory has no files to link to"):
        source_files(torch.nn.Linear(2, 2))
