"""A tiny model as users have theirs: a folder with weights and a tokenizer. Only tests import this."""

from __future__ import annotations

from pathlib import Path

from fluxc.tiny_models import tiny_llama

VOCAB = 800
CONTEXT = 2048


def save_tiny_model(folder: Path, layers: int = 3, context: int = CONTEXT) -> Path:
    """Write a random Llama of `layers` layers with a byte-pair tokenizer trained on the packaged corpus; seeded.

    The tokenizer has VOCAB entries, so corpus prompts fit into `context` tokens. Takes about a second.
    """
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    model = tiny_llama(vocab_size=VOCAB, num_hidden_layers=layers, max_position_embeddings=context, **ends)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from fluxc.data import corpus

    text = corpus.read(corpus.pieces(kind="prose")[0])[:200_000]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
