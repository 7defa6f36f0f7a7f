"""Requests that do not fit the schema, said in words a client can use."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError

from fluxc.serve.errors import ApiError

_LONGEST = 300
"""Characters of a message: it must not carry a whole request back."""
ONLY_NEUTRAL = frozenset(
    (
        *("presence_penalty", "frequency_penalty", "logit_bias", "best_of", "echo", "suffix", "store", "modalities"),
        *("tools", "tool_choice", "tool_calls", "function_call", "response_format", "refusal", "audio", "annotations"),
        "include_obfuscation",
    )
)
"""Parameters of OpenAI's that are taken as long as they ask for nothing."""


def of_validation(fault: RequestValidationError) -> ApiError:
    """The first thing wrong, named: 400."""
    found = _worst(list(fault.errors()))
    kind, where = found["type"], _where(found["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if kind == "extra_forbidden" or ONLY_NEUTRAL & set(where.split(".")):
        what = "" if kind == "extra_forbidden" else " with this value"
        text = f"the parameter {where[:_LONGEST]} is not supported{what}"
        return ApiError(400, text, param=where[:_LONGEST], code="unsupported_parameter")
    if kind == "missing" and not where:
        return ApiError(400, "the body is empty: a JSON object is wanted")
    text = f"{where}: {found['msg']}" if where else str(found["msg"])
    return ApiError(400, text[:_LONGEST], param=where[:_LONGEST] or None, code="invalid_value")


def _worst(found: list[Any]) -> Any:
    """What is not supported at all comes first, then a value out of range, then one of the wrong type.

    Each variant of a union complains; the one whose type fits says what is really wrong.
    """
    return max(found, key=lambda one: (one["type"] == "extra_forbidden", not one["type"].endswith("_type")))


def _where(location: Any) -> str:
    """`messages.0.content` of ("body", "messages", 0, "content", "str")."""
    parts = [str(part) for part in location if part != "body"]
    kept = [part for part in parts if not _is_variant(part)]
    return ".".join(kept)


def _is_variant(part: str) -> bool:
    """Whether a part of a location names a variant of a union (`list[int]`, `str`, `TextPart`)."""
    return "[" in part or part in ("str", "int", "float", "TextPart")
