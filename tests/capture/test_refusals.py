"""What capture refuses: each by name, with exit code 2, and the model left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fluxc
from fluxc.capture.adapter import read_call
from fluxc.capture.masks import probe_layers
from fluxc.capture.refuse import refuse_config
from fluxc.capture.twin import reference_twin
from fluxc.errors import CaptureError, SourceError, UnsupportedAttentionError
from fluxc.testing import tiny_llama
from fluxc.tiny_models import CONTEXT, build


class Attention(torch.nn.Module):
    layer_idx = 3


def call(**kwargs: Any) -> Any:
    q, k = torch.ones(1, 4, 5, 8), torch.ones(1, 2, kwargs.pop("keys", 5), 8)
    return read_call(Attention(), q, k, kwargs.pop("mask", None), CONTEXT, {"scaling": 0.5, **kwargs})


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN_ATTENTION = {
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SMALL,
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4},
    "gptj": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
}


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_models_with_their_own_attention(family: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=f"^{family}: .*AttentionInterface") as refused:
        fluxc.capture(build(family, **OWN_ATTENTION[family]))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bert", "encoder"), ("roberta", "encoder"), ("t5", "encoder-decoder"), ("vit", "not a causal language model")],
)
def test_models_that_are_no_decoder(family: str, reason: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(SourceError, match=f"{family} is an? {reason}|{family} is {reason}"):
        refuse_config(AutoConfig.for_model(family))


def test_headless_model() -> None:
    with pytest.raises(SourceError, match="LlamaModel has no language-model head"):
        fluxc.capture(tiny_llama().model)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"position_bias": torch.ones(1)}, "passes 'position_bias', which fluxc does not know"),
        ({"head_mask": 0.5}, "passes 'head_mask'"),
        ({"mask": torch.ones(1)}, "gets a mask"),
        ({"dropout": 0.1}, "has dropout"),
        ({"is_causal": False}, "is not causal"),
        ({"keys": 7}, "attends to another sequence"),
    ],
)
def test_attention_keywords_that_are_not_understood(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=f"layer 3 {reason}"):
        call(**kwargs)


def test_attention_keywords_that_are() -> None:
    sinks = torch.ones(4)
    read = call(sliding_window=8, softcap=30.0, s_aux=sinks, dropout=0.0, position_ids=torch.ones(1), use_cache=False)
    assert read.keywords() == {"scale": 0.5, "layer": 3, "window": 8, "softcap": 30.0, "sink_logits": sinks}
    assert call(sliding_window=None, position_bias=None).keywords() == {"scale": 0.5, "layer": 3}


def test_window_as_long_as_the_context_is_none() -> None:
    assert call(sliding_window=CONTEXT).window == 0
    assert call(sliding_window=CONTEXT - 1).window == CONTEXT - 1


def test_chunked_mask_is_refused() -> None:
    """Llama 4's chunks are in the mask alone; the attention function never hears of them."""
    from transformers.masking_utils import create_chunked_causal_mask
    from transformers.models.llama import modeling_llama

    model = reference_twin(tiny_llama())
    model.config.attention_chunk_size = 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "create_causal_mask", _without_unknown(create_chunked_causal_mask))
        with pytest.raises(UnsupportedAttentionError, match=r"mask of layer 0 is not causal: .*query 16 and key"):
            probe_layers(model, CONTEXT)


def _without_unknown(create: Any) -> Any:
    def call_it(config: Any, inputs_embeds: Any, attention_mask: Any, past_key_values: Any, **_: Any) -> Any:
        return create(config, inputs_embeds, attention_mask, past_key_values)

    return call_it


def test_bidirectional_model_is_refused() -> None:
    model = tiny_llama()
    model.config.is_causal = False
    with pytest.raises(UnsupportedAttentionError, match="layer 0 is not causal"):
        fluxc.capture(model)


def test_exporter_reason_is_passed_on() -> None:
    model = tiny_llama()
    plain = model.model.norm.forward
    model.model.norm.forward = lambda x: plain(x) if x.sum() > 0 else x
    with pytest.raises(CaptureError, match="LlamaForCausalLM cannot be exported"):
        fluxc.capture(model)


def test_self_check_names_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program traced with another window than the model's is wrong past that window."""
    from fluxc.capture import adapter
    from fluxc.errors import SelfCheckError
    from fluxc.tiny_models import TINY_FAMILIES, WINDOW

    right = adapter._window
    monkeypatch.setattr(adapter, "_window", lambda window, context: right(window, context) and WINDOW)
    model = TINY_FAMILIES["gemma2"](sliding_window=20)
    monkeypatch.setattr("fluxc.capture.masks._prove", lambda *_: None)
    with pytest.raises(SelfCheckError, match="at length 11") as wrong:
        fluxc.capture(model)
    assert wrong.value.exit_code == 1


def test_model_is_left_as_it_was() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    model = tiny_llama().train()
    config, state = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    known = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    program = fluxc.capture(model).program
    assert (model.config.to_dict(), model.config._attn_implementation) == (config, "sdpa")
    assert model.training and "forward" not in vars(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == known
    embedding = program.state_dict["model.embed_tokens.weight"]
    assert embedding.data_ptr() == model.model.embed_tokens.weight.data_ptr()
