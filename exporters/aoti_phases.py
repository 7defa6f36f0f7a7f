"""The programs of an AOTI engine, cut from one routed program: prefill with its conditionals, decode and append."""

from __future__ import annotations

from torch.export.exported_program import ExportedProgram

from fluxc import passes
from fluxc.exporters.aoti_pieces import Cut, cut
from fluxc.ir.layers import attention_nodes
from fluxc.passes.dead_code import DeadCode
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.lower_to_cond import LowerToCond

PHASES = ("prefill", "decode", "append")


def phases_of(routed: ExportedProgram) -> dict[str, Cut]:
    """Each program in pieces, over the routed program's own weights."""
    kept = [f"{name}_{index}" for index in range(len(attention_nodes(routed.graph))) for name in "kv"]
    return {
        "prefill": cut(_prefill(routed), ["logits", "routes", "scores", *kept]),
        "decode": cut(passes.decode_pipeline().run(routed, "routed").program, ["logits"]),
        "append": cut(passes.append_pipeline().run(routed, "routed").program, ["logits"]),
    }


def _prefill(routed: ExportedProgram) -> ExportedProgram:
    """One request; a `torch.cond` for each routable layer."""
    program = routed
    for step in (ExposeKV(), LowerToCond(), DeadCode()):
        program = step.apply(program).program
    return program
