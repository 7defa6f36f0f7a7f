"""The graph part of a saved program: every text in it is checked, and only what is needed goes on to torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fluxc import archive_text
from fluxc.errors import ArchiveError

_MAX_DEPTH = 64
_KEPT_METADATA = ("nn_module_stack", "torch_fn", "custom")
_VERIFIERS = ("", "ATEN", "TRAINING")
_PLAIN_TREES = (None, "builtins.tuple", "builtins.list", "builtins.dict")

# What each text field of torch's schema may hold. A text under any other key is refused.
_RULES: dict[str, Callable[[str], None]] = {
    "name": archive_text.check_name,
    "as_name": archive_text.check_name,
    "user_input_name": archive_text.check_name,
    "forward_arg_names": archive_text.check_name,
    "parameter_name": archive_text.check_path,
    "buffer_name": archive_text.check_path,
    "tensor_constant_name": archive_text.check_path,
    "fqn": archive_text.check_path,
    "type": archive_text.check_name,
    "target": archive_text.check_operator,
    "as_operator": archive_text.check_operator,
    "expr_str": archive_text.check_expression,
    "guards_code": archive_text.check_guard,
    "as_string": archive_text.check_free_text,
    "as_strings": archive_text.check_free_text,
    "torch_version": archive_text.check_free_text,
}
_CODE_FIELDS = {
    "as_custom_obj": "a custom object",
    "custom_obj": "a custom object",
    "as_string_to_argument": "a Triton kernel",
}


def parse_json(data: bytes, name: str) -> Any:
    """The JSON value in `data`; raises ArchiveError naming the member where it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"the archive is damaged: {name} is not JSON ({error})", hint="save it again") from error


def checked_model(model: Any) -> dict[str, Any]:
    """A copy of the model description that torch may load; raises ArchiveError at the first thing it would execute.

    Stack traces and other metadata that nothing needs are left out, input and output trees of foreign classes are
    flattened, and the calling conventions of submodules are dropped.
    """
    try:
        graph_module = model["graph_module"]
        clean = {key: value for key, value in model.items() if key not in ("graph_module", "range_constraints")}
        clean["graph_module"] = {
            "graph": _checked_graph(graph_module["graph"]),
            "signature": graph_module["signature"],
            "metadata": _checked_metadata(graph_module.get("metadata") or {}),
            "treespec_namedtuple_fields": {},
        }
        _check(clean, "", 0)
        _check_verifiers(model.get("verifiers", []))
        clean["verifiers"] = model.get("verifiers", [])
        clean["graph_module"]["module_call_graph"] = [_root_entry(graph_module)]
        clean["range_constraints"] = _checked_ranges(model["range_constraints"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__} {error}"
        raise ArchiveError(f"the archive's graph is damaged ({reason})", hint="save the program again") from error
    return clean


def _check(value: Any, key: str, depth: int) -> None:
    """Check every text below `value`, which stands under `key`."""
    if depth > _MAX_DEPTH:
        raise ArchiveError("the archive's graph is nested too deeply", hint="save the program again")
    if isinstance(value, str):
        _check_text(key, value)
    elif isinstance(value, list):
        for item in value:
            _check(item, key, depth + 1)
    elif isinstance(value, dict) and key != "metadata":
        for name, item in value.items():
            archive_text.check_path(name)
            if name in _CODE_FIELDS and item:
                raise ArchiveError(f"the archive holds {_CODE_FIELDS[name]}, which fluxc does not load")
            _check(item, name, depth + 1)


def _check_text(key: str, text: str) -> None:
    if key == "verifiers":
        return
    if key not in _RULES:
        raise ArchiveError(f"the archive has text in the unknown field {key!r}", hint="save it with a tested torch")
    _RULES[key](text)


def _checked_graph(graph: Any) -> Any:
    """The graph with only the harmless metadata, branches of conditionals included."""
    if isinstance(graph, list):
        return [_checked_graph(item) for item in graph]
    if not isinstance(graph, dict):
        return graph
    return {
        key: _checked_metadata(value) if key == "metadata" else _checked_graph(value) for key, value in graph.items()
    }


def _checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    kept = {key: metadata[key] for key in _KEPT_METADATA if key in metadata}
    for text in kept.values():
        archive_text.check_free_text(text)
    if "custom" in kept:
        parse_json(kept["custom"].encode(), "custom metadata")
    return kept


def _check_verifiers(names: list[str]) -> None:
    for name in names:
        if name not in _VERIFIERS:
            raise ArchiveError(
                f"the archive wants the unknown verifier {name!r}", hint="save it with torch.export.save"
            )


def _checked_ranges(ranges: dict[str, Any]) -> dict[str, Any]:
    for symbol, bounds in ranges.items():
        archive_text.check_symbol(symbol)
        if any(not isinstance(bound, int | None) for bound in bounds.values()):
            raise ArchiveError(f"the range of {symbol} is not made of numbers", hint="save the program again")
    return ranges


def _root_entry(graph_module: dict[str, Any]) -> dict[str, Any]:
    """How the whole program is called: as it was saved where a tree is plain, else with flat inputs or outputs."""
    saved = graph_module["module_call_graph"][0]["signature"] or {}
    names: Any = [name for spec in graph_module["signature"]["input_specs"] for name in _input_names(spec)]
    outputs = sum("user_output" in spec for spec in graph_module["signature"]["output_specs"])
    in_spec, out_spec = _plain_tree(saved.get("in_spec")), _plain_tree(saved.get("out_spec"))
    if in_spec is None:
        in_spec = _tree(_node("builtins.tuple", "null", [_tuple_of(len(names)), _node("builtins.dict", "[]", [])]))
    else:
        names = saved.get("forward_arg_names")
    if out_spec is None:
        out_spec = _tree(_LEAF if outputs == 1 else _tuple_of(outputs))
    _check(names, "forward_arg_names", 0)
    signature = {"inputs": [], "outputs": [], "in_spec": in_spec, "out_spec": out_spec, "forward_arg_names": names}
    return {"fqn": "", "signature": signature}


def _input_names(spec: dict[str, Any]) -> list[str]:
    if "constant_input" in spec:
        return [spec["constant_input"]["name"]]
    if "user_input" not in spec:
        return []
    value = next(iter(spec["user_input"]["arg"].values()))
    return [value.get("name") or value["as_name"]]


def _plain_tree(text: Any) -> str | None:
    """The tree description if it only has tuples, lists and dicts with plain keys, rewritten by us; else None.

    torch imports modules named in a tree's context, so contexts of other kinds never reach it.
    """
    if not isinstance(text, str) or len(text) > 1_000_000:
        return None
    protocol, root = parse_json(text.encode(), "in_spec")
    return _tree(root) if protocol == 1 and _is_plain_tree(root) else None


def _is_plain_tree(node: dict[str, Any]) -> bool:
    kind, context = node["type"], node["context"]
    if set(node) != {"type", "context", "children_spec"} or kind not in _PLAIN_TREES:
        return False
    keys = json.loads(context) if isinstance(context, str) else context
    if kind == "builtins.dict":
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            return False
        for key in keys:
            archive_text.check_name(key)
    elif keys is not None:
        return False
    return all(_is_plain_tree(child) for child in node["children_spec"])


_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def _node(kind: str, context: str, children: list[Any]) -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": children}


def _tuple_of(count: int) -> dict[str, Any]:
    return _node("builtins.tuple", "null", [_LEAF] * count)


def _tree(root: dict[str, Any]) -> str:
    return json.dumps([1, root])
