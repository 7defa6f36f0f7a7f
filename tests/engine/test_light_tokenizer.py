"""The tokenizer without transformers gives transformers' own ids, texts and chats; templates stay in their sandbox."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from fluxc.engine.light_tokenizer import LightTokenizer
from fluxc.errors import ArchiveError, DataError
from fluxc.testing import tiny_tokenizer

TEXTS = ["The quick brown fox", "", "  spaced\n\tout ", "Ünïcode 中文 🙂", "a" * 300]
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}, {"role": "user", "content": "!"}]
TEMPLATE = (
    "{% for m in messages %}\n<{{ m.role }}>{{ m['content'] | tojson }}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% break %}{% endfor %}{{ ns.n }}"
    "{{ dict(a=1).a }}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_ids_and_texts(folder):
    ours, theirs = LightTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours(text, add_special_tokens=special)["input_ids"] == ids
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.decode(3) == theirs.decode(3)


def test_chats(folder):
    ours, theirs = LightTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        text = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        assert ours.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=True)["input_ids"] == ids


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}{{ messages.__class__.__mro__[1] }}",
        "{{ dict.__globals__['json'] }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no such role') }}",
        "{% for %}",
    ],
)
def test_templates_that_reach_out_or_refuse(folder, template):
    tokenizer = LightTokenizer(folder)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="the chat template refuses"):
        tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_what_is_no_tokenizer(folder, tmp_path):
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert LightTokenizer(folder).chat_template == "d"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="no chat template"):
        LightTokenizer(folder).apply_chat_template(CHAT)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ArchiveError, match="is no JSON"):
        LightTokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ArchiveError, match="is no tokenizer"):
        LightTokenizer(folder)
    assert not LightTokenizer.can_read(folder / "nothing")
