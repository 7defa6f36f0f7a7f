"""Target `aoti`: prefill, decode and append as AOTInductor packages over one copy of the weights.

Prefill is the routed program of one request: a `torch.cond` for each routable layer, routers inside, `route_bias` an
input. Decode and append are batched and have no branch; their cache is an input that they write in place. The weights
are in no package: they are mapped from `weights/` and handed to the packages as constants the caller manages.

Attention and what reads the cache are fluxc's own ops: in Python those of this package, in C++ those of `cpp/ops.cpp`.
ATen could say some of them, but not sparse attention over a length that is free: that loops over chunks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export.exported_program import ExportedProgram
from torch.fx import GraphModule

from fluxc import kernels
from fluxc.errors import InternalError, TargetError
from fluxc.exporters.aoti_compile import compile_cut, no_compiler
from fluxc.exporters.aoti_phases import Phase, phases_of
from fluxc.exporters.aoti_programs import RECIPES, WEIGHTS, open_programs
from fluxc.exporters.aoti_slots import AotiPhases
from fluxc.exporters.machine import this_machine
from fluxc.ir.kv import kv_geometry
from fluxc.ir.layers import attention_nodes
from fluxc.ir.nodes import argument, calls
from fluxc.json_form import dump
from fluxc.passes.merge_linears import groups_of
from fluxc.weight_files import SHARD_BYTES, in_groups, split_aliases, write_shards

KV = {"layout": "paged", "axes": "pages,2,Hk,64,D", "prefill": "k_<a>, v_<a>", "decode": "cache"}
OPS = frozenset(
    ("attention", "streaming_attention", "triangle_attention", "router_pool", "kv_write", "decode_attention"),
).union(("append_attention", "grouped_mm"))
"""The ops of fluxc that a package may call: those that cpp/ops.cpp has."""


def check(routed: ExportedProgram) -> None:
    """What can be known to fail before long work.

    Raises TargetError without a C++ compiler, for another device than the CPU, and for attention that has no
    conditional; UnsupportedAttentionError for layers that one cache cannot hold.
    """
    kernels.register()
    kv_geometry(attention_nodes(routed.graph))
    device = next(node.meta["val"].device for node in routed.graph.nodes if node.name == "input_ids")
    if device.type != "cpu":
        raise TargetError(
            f"target aoti builds for the CPU, not for {device}: fluxc's kernels have no triton_op form yet",
            hint="export on the CPU, or run the model.flux itself on the GPU",
        )
    for node in calls(routed, torch.ops.fluxc.routed_attention):
        if argument(node, "kind") == "block":
            raise TargetError(
                f"layer {argument(node, 'layer')} has the sparse kind block, which has no single op to branch to",
                hint="transform with --sparse-kind streaming or triangle",
            )
    if compiler() is None:
        raise no_compiler()


def build(routed: ExportedProgram, root: Path) -> dict[str, Any]:
    """Write weights, recipes and the packages to `root`; returns `programs` of the manifest.

    Raises BuilderError with the compiler's last lines, StorageError where it ran out of space.
    """
    phases = phases_of(routed)
    check_phases(phases, len(calls(routed, torch.ops.fluxc.routed_attention)))
    aliases = _write_weights(routed, root)
    recipes = {phase: _described(phase, made, aliases) for phase, made in phases.items()}
    text = dump({"machine": this_machine(), "programs": recipes}, InternalError, "the recipes of the engine")
    (root / RECIPES).write_text(text, encoding="utf-8")
    for phase, made in phases.items():
        compile_cut(made.cut, root / _package(phase))
    return {phase: {"file": _package(phase), **made.signature} for phase, made in phases.items()}


def phases(root: Path) -> AotiPhases:
    """The engine in `root`, runnable on torch tensors."""
    return AotiPhases(open_programs(root, torch.device("cpu"), torch.__version__))


def tools() -> dict[str, str]:
    """The compiler that shaped the packages."""
    name = compiler() or ""
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout if name else ""
    return {"compiler": said.partition("\n")[0] or "none"}


def compiler() -> str | None:
    """The C++ compiler that torch will call, None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def check_phases(phases: Mapping[str, Phase], routable: int) -> None:
    """Raise InternalError unless conds are in prefill alone, one a routable layer, and all ops exist in C++ too."""
    for phase, made in phases.items():
        pieces = [call.piece for call in made.cut.recipe.calls]
        found = sum(_targets(made.cut.modules[piece]).count(torch.ops.higher_order.cond) for piece in pieces)
        if found != (routable if phase == "prefill" else 0):
            raise InternalError(f"{phase} has {found} conditionals, {routable} layers are routable")
        unknown = {str(op) for op in our_ops(made.cut.modules) if op not in OPS}
        if unknown:
            raise InternalError(f"{phase} calls fluxc::{', '.join(sorted(unknown))}, which cpp/ops.cpp has not")


def our_ops(modules: Mapping[str, GraphModule]) -> set[str]:
    """Names of fluxc's ops in modules and their branches."""
    found = (target for module in modules.values() for target in _targets(module))
    return {target._opname for target in found if getattr(target, "namespace", "") == "fluxc"}


def _targets(module: GraphModule) -> list[Any]:
    return list(_walk(module))


def _walk(module: GraphModule) -> Iterator[Any]:
    for node in module.graph.nodes:
        if node.op == "call_function":
            yield node.target
    for child in module.children():
        if isinstance(child, GraphModule):
            yield from _walk(child)


def _write_weights(routed: ExportedProgram, root: Path) -> dict[str, str]:
    """All tensors of the program, each once; returns the owner of every name that shares another's."""
    tensors = {name: t for name, t in {**routed.constants, **routed.state_dict}.items() if isinstance(t, torch.Tensor)}
    stored, aliases = split_aliases(tensors)
    write_shards(in_groups(stored, groups_of(routed)), root, WEIGHTS, SHARD_BYTES)
    return aliases


def _described(phase: str, made: Phase, aliases: Mapping[str, str]) -> dict[str, Any]:
    values = made.cut.recipe.to_dict()
    for call in values["calls"]:
        call["weights"] = {name: aliases.get(weight, weight) for name, weight in call["weights"].items()}
    return {"file": _package(phase), **values}


def _package(phase: str) -> str:
    return f"{phase}.pt2"
