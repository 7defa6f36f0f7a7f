"""A model made of pieces: what is alike is translated once, whatever the depth, and each layer keeps its weights."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

import numpy as np
import torch

from fluxc.exporters import onnx, onnx_translate
from fluxc.exporters.aoti_pieces import fingerprint
from fluxc.exporters.onnx_options import OnnxOptions
from fluxc.testing import ToyConfig
from fluxc.toy_decoder import toy_program
from fluxc.toy_flux import toy_routed as route

LAYERS = 4


@pytest.fixture(scope="module")
def models():
    """Prefill and decode of four equal layers, and how many pieces were translated for each."""
    counts = []
    original = onnx_translate._translated
    routed = route(toy_program(ToyConfig(windows=(0,) * LAYERS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_translate, "_translated", lambda *args: counts.append(1) or original(*args))
        prefill = onnx._prefill(routed, OnnxOptions())
        first = len(counts)
        decode = onnx.decode_model(routed)
    return routed, {"prefill": prefill, "decode": decode}, {"prefill": first, "decode": len(counts) - first}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_layers_that_are_alike_are_translated_once(models, phase):
    """Prologue, layer, epilogue. In decode too, where the caches of layers differ in length."""
    _, found, translated = models
    assert translated[phase] == 3
    assert next(value.name for value in found[phase].graph.inputs) == "input_ids"
    names = [value.name for node in found[phase].graph for value in node.outputs]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_each_layer_reads_its_own_weights(models, phase):
    routed, found, _ = models
    graph = found[phase].graph
    weights = {name: value for name, value in routed.state_dict.items() if "layers" in name and value.ndim == 2}
    assert len(weights) >= 4 * LAYERS
    for name, value in weights.items():
        if not name.startswith("routers"):
            np.testing.assert_array_equal(graph.initializers[name].const_value.numpy(), value.detach().numpy())
            assert graph.initializers[name].uses()


def test_free_sizes_count_by_their_first_appearance():
    def module(first, second):
        graph = torch.fx.Graph()
        a, b = graph.placeholder("a"), graph.placeholder("b")
        a.meta["val"], b.meta["val"] = first, second
        graph.output((a, b))
        return torch.fx.GraphModule({}, graph)

    mode = torch._subclasses.fake_tensor.FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv())
    x, y = (mode.from_tensor(torch.empty(5 + size, 2), static_shapes=False) for size in range(2))
    texts = [fingerprint(module(*pair)) for pair in ((x, x), (y, y), (x, y), (y, x))]
    assert texts[0] == texts[1] != texts[2] == texts[3]
