"""What the tests of all parts share: tiny models and helpers for exported programs. Nothing else imports this."""

from __future__ import annotations

from fluxc.kernel_testing import (
    GRADIENT_FACTOR,
    TOLERANCES,
    LargestAllocation,
    PoisonedMemory,
    assert_close,
    gradients,
    layouts,
    random_qkv,
)
from fluxc.tiny_models import TINY_FAMILIES, tiny_llama, tiny_llama_rope
from fluxc.tiny_tokenizer import tiny_tokenizer
from fluxc.toy_decoder import TOY_ROPES, ToyConfig, toy_inputs, toy_module, toy_program, toy_routed_inputs
from fluxc.toy_foreign import causal_attend, export_from, foreign_module, foreign_program, free

__all__ = [
    "GRADIENT_FACTOR",
    "TINY_FAMILIES",
    "TOLERANCES",
    "TOY_ROPES",
    "LargestAllocation",
    "PoisonedMemory",
    "ToyConfig",
    "assert_close",
    "causal_attend",
    "export_from",
    "foreign_module",
    "foreign_program",
    "free",
    "gradients",
    "layouts",
    "random_qkv",
    "tiny_llama",
    "tiny_llama_rope",
    "tiny_tokenizer",
    "toy_inputs",
    "toy_module",
    "toy_program",
    "toy_routed_inputs",
]
