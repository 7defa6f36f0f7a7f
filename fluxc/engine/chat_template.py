"""Chat templates in jinja's sandbox, as transformers renders them: a template sees plain values and nothing else."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping
from typing import Any


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Any:
    """The template of a text; raises jinja2.TemplateError for one that is not valid."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _new_dict, "namespace": _namespace()}
    return made.from_string(source)


def plain(value: Any) -> Any:
    """The value made of JSON's own types: objects with methods of their own do not get into the sandbox."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # a subclass may have an own one
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return type(value).__name__


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """In place of the class `dict`, through whose attributes a template could reach others."""
    return dict(*args, **kwargs)


def _namespace() -> Any:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a chat template stores the attribute {name!r}")

    class Plain(Namespace):
        """Attributes, none of which begins with an underscore."""

        def __setitem__(self, name: Any, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    def make(*args: Any, **kwargs: Any) -> Any:
        for name in dict(*args, **kwargs):
            check(name)
        return Plain(*args, **kwargs)

    return make


def _generation() -> Any:
    """The tag `generation`, with which templates mark what the assistant said."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        """Renders what it holds."""

        tags = {"generation"}  # noqa: RUF012  # jinja reads it from the class

        def parse(self, parser: Any) -> Any:
            """The statements up to `endgeneration`."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation
