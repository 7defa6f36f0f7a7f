"""A tokenizer that is made in a moment and reads any text. Only tests import this."""

from __future__ import annotations

from typing import Any

VOCAB = 800
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def tiny_tokenizer(vocab: int = VOCAB, chat: bool = True) -> Any:
    """A byte-level byte-pair tokenizer of `vocab` entries trained on a part of the packaged corpus; always the same.

    `<s>` is 0, `</s>` is 1. With `chat` it has a chat template, which strips the message as many do.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from fluxc.data import corpus

    text = corpus.read(corpus.pieces(kind="prose")[0])[:200_000]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text], vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False)
    template = CHAT_TEMPLATE if chat else None
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )
