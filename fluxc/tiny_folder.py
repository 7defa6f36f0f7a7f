"""A tiny model as users have theirs: a folder with weights and a tokenizer. Only tests import this."""

from __future__ import annotations

from pathlib import Path

from fluxc.tiny_models import tiny_llama
from fluxc.tiny_tokenizer import tiny_tokenizer

VOCAB = 6000
CONTEXT = 4096


def save_tiny_model(folder: Path, layers: int = 3, context: int = CONTEXT) -> Path:
    """Write a random Llama of `layers` layers and a tokenizer of VOCAB entries without a chat template; seeded.

    That vocabulary is large enough for generated prompts to fit into `context` tokens. Takes about a second.
    """
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    tiny_llama(vocab_size=VOCAB, num_hidden_layers=layers, max_position_embeddings=context, **ends).save_pretrained(
        folder
    )
    tiny_tokenizer(VOCAB, chat=False).save_pretrained(folder)
    return folder
