"""Published routers: METHOD's shapes under anybody's names, and `transform --routers`."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from fluxc.cli import main
from fluxc.errors import DataError
from fluxc.flux_dir import open_flux
from fluxc.router import LayerRouter, RouterSpec, init_router, router_name
from fluxc.tiny_folder import save_tiny_model
from fluxc.train.published import read_routers

THEIRS = {
    "encoder.0": "cls_feat_extractor.0",
    "encoder.2": "cls_feat_extractor.2",
    "head.0": "router.mlp.0",
    "head.2": "router.mlp.2",
    "head.4": "router.mlp.4",
}
WORDS = ["moon", "river", "stone", "cloud", "garden", "winter", "table", "number", "letter", "forest"]


def ours(width, layers=(0, 1), seed=3):
    states = {layer: init_router(RouterSpec(width), seed + layer) for layer in layers}
    return {router_name(layer) + name: t for layer, state in states.items() for name, t in state.items()}


def theirs(state):
    renamed = {}
    for name, tensor in state.items():
        _, layer, rest = name.split(".", 2)
        linear, kind = rest.rsplit(".", 1)
        renamed[f"model.layers.{layer}.self_attn.mask.{THEIRS[linear]}.{kind}"] = tensor.bfloat16()
    return renamed


def test_a_router_of_width_128_has_the_papers_parameters(tmp_path):
    state = ours(128, layers=(0,))
    save_file(theirs(state), tmp_path / "published.safetensors")
    found = read_routers(tmp_path / "published.safetensors")
    assert sum(tensor.numel() for tensor in found.values()) == 592_002
    LayerRouter(RouterSpec(128)).load_state_dict({n.removeprefix("routers.0."): t for n, t in found.items()})


@pytest.mark.parametrize("rename", [dict, theirs])
@pytest.mark.parametrize("width", [8, 64])
def test_names_do_not_matter(tmp_path, rename, width):
    state = ours(width, layers=(0, 3, 11))
    save_file(rename(state), tmp_path / "r.safetensors")
    found = read_routers(tmp_path / "r.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda state: state.pop("routers.1.head.2.weight"), "layer 1: there is no linear layer of 32 to 8"),
        (lambda state: state.update({"routers.0.more": torch.ones(2)}), "layer 0: 11 tensors where a router has 10"),
        (lambda state: state.update({"norm.weight": torch.ones(2)}), "holds no layer number"),
        (lambda state: state.clear(), "holds no tensors"),
    ],
)
def test_what_is_no_router(tmp_path, edit, said):
    state = ours(8)
    edit(state)
    save_file(state, tmp_path / "r.safetensors")
    with pytest.raises(DataError, match=said):
        read_routers(tmp_path / "r.safetensors")


def test_a_pickle_is_refused(tmp_path):
    torch.save(ours(8), tmp_path / "r.pt")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        read_routers(tmp_path / "r.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", layers=2)


@pytest.fixture
def transform(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    texts = [" ".join(rng.choice(WORDS) for _ in range(100)) for _ in range(12)]
    rows = [{"prompt": f"Code {n}: {text} Code {n}?", "answer": f" {n}"} for n, text in enumerate(texts)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = ("--prompts", "mine.jsonl", "--effort", "quick", "--sink", "4", "--window", "32", "--device", "cpu")
    return lambda *argv: main(["transform", str(folder), *shared, "-o", "m.flux", "-q", *argv])


def head_width(folder):
    config = json.loads((folder / "config.json").read_text())
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def test_transform_uses_them(folder, transform, tmp_path):
    state = ours(head_width(folder))
    save_file(theirs(state), tmp_path / "published.safetensors")
    assert transform("--routers", "published.safetensors", "--budget", "0.5") == 0
    flux = open_flux("m.flux")
    assert all(torch.equal(flux.routers[name], theirs(state)[other].float()) for name, other in names(state))
    assert flux.plan.calibration["routers"] == "published.safetensors"
    assert 0.2 <= flux.plan.achieved_at()["full_share"] <= 0.8
    assert json.loads((flux.path / "measurements/calibration.json").read_text())["routers"] == "published.safetensors"


def names(state):
    return zip(state, theirs(state), strict=True)


@pytest.mark.parametrize(("width", "layers"), [(4, (0, 1)), (0, (0, 1, 2))])
def test_transform_refuses_another_models(folder, transform, tmp_path, capsys, width, layers):
    save_file(ours(width or head_width(folder), layers), tmp_path / "r.safetensors")
    assert transform("--routers", "r.safetensors") == 2
    assert "These routers belong to another model" in capsys.readouterr().err
    assert not (tmp_path / "m.flux").exists()


def test_transform_refuses_routers_of_some_layers(folder, transform, tmp_path, capsys):
    save_file(ours(head_width(folder), layers=(1,)), tmp_path / "r.safetensors")
    assert transform("--routers", "r.safetensors") == 2
    assert "there is no router for layer 0" in capsys.readouterr().err
