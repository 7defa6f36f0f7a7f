"""Strict JSON for the records fluxc writes: unknown and missing keys are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

from fluxc.errors import FluxcError

T = TypeVar("T")
_TYPES: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "dict[str, Any]": dict}


def strict(cls: type[T], values: Any, error: type[FluxcError], where: str) -> T:
    """Build the dataclass `cls` from a JSON object; raises `error` for an unknown key or a missing one."""
    if not isinstance(values, dict):
        raise error(f"{where} must be an object, not {type(values).__name__}")
    fields: dict[str, Any] = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise error(f"{where} has an unknown key {unknown[0]!r}", hint=f"it knows {', '.join(sorted(fields))}")
    missing = [name for name in fields if name not in values and _required(fields[name])]
    if missing:
        raise error(f"{where} lacks {missing[0]!r}")
    for name, value in values.items():
        if not isinstance(value, _TYPES.get(fields[name].type, object)):
            raise error(f"{name} of {where} is {value!r}, not {fields[name].type}")
    return cls(**values)


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def parse(text: str, error: type[FluxcError], where: str) -> Any:
    """JSON text as plain values; raises `error` for text that is no JSON and for NaN or infinities."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as cause:
        raise error(f"{where} is not valid JSON: {cause}") from cause


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def dump(value: Any, error: type[FluxcError], where: str) -> str:
    """`value` as indented JSON text; raises `error` for NaN, infinities and objects that are no JSON."""
    try:
        return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (ValueError, TypeError) as cause:
        raise error(f"{where} cannot be written as JSON: {cause}") from cause


def read_text(path: Path, error: type[FluxcError]) -> str:
    """The text of a file; raises `error`, naming the file, where it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as cause:
        raise error(f"{path} does not exist") from cause
    except (OSError, UnicodeDecodeError) as cause:
        raise error(f"{path} cannot be read: {cause}") from cause
