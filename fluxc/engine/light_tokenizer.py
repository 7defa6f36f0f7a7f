"""A tokenizer of `tokenizers` alone, for engines that load neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxc.engine.chat_template import compiled, plain
from fluxc.errors import ArchiveError, DataError

_FILE, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class LightTokenizer:
    """What the engine asks of a tokenizer: its call, `decode`, `apply_chat_template`; results equal transformers'."""

    is_fast = True

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / _FILE))
        except Exception as cause:  # the library raises nothing more special
            raise ArchiveError(f"{folder / _FILE} is no tokenizer: {cause}") from cause
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _read_json(folder / _CONFIG)
        template = folder / _TEMPLATE
        own = template.read_text(encoding="utf-8") if template.is_file() else self._config.get("chat_template")
        self.chat_template: str | None = own if isinstance(own, str) else _default(own)

    @staticmethod
    def can_read(folder: Path) -> bool:
        """Whether `folder` holds a tokenizer of this library."""
        return (folder / _FILE).is_file()

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning of a text."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of the end of a text."""
        return self._id("eos_token")

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        """`input_ids` of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return {"input_ids": ids}

    def decode(self, ids: Iterable[int] | int, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        tokens = [ids] if isinstance(ids, int) else [int(token) for token in ids]
        return str(self._tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
        **values: Any,
    ) -> Any:
        """The messages as one text, or its ids; raises DataError where the template refuses them."""
        special = {name: self._token(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        known = {name: token for name, token in special.items() if token is not None}
        if self.chat_template is None:
            raise DataError("this model has no chat template", hint="give the prompt as a text")
        try:
            text = compiled(self.chat_template).render(
                messages=plain(messages), add_generation_prompt=add_generation_prompt, **known, **plain(values)
            )
        except Exception as cause:  # the template is a program of the model's: it may fail in any way
            raise DataError(f"the chat template refuses these messages: {cause}") from cause
        if not tokenize:
            return text
        found = self(text, add_special_tokens=False)
        return found if return_dict else found["input_ids"]

    def _token(self, name: str) -> str | None:
        value = self._config.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        return token if isinstance(token, str) else None

    def _id(self, name: str) -> int | None:
        token = self._token(name)
        found: int | None = None if token is None else self._tokenizer.token_to_id(token)
        return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as cause:
        raise ArchiveError(f"{path} is no JSON") from cause
    return values if isinstance(values, dict) else {}


def _default(templates: Any) -> str | None:
    """Of several named templates the one called default."""
    named = templates if isinstance(templates, list) else []
    return next((each["template"] for each in named if each.get("name") == "default"), None)
