"""The graph passes, one file each, and the order they run in.

Importing this package imports no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxc.ir.pass_base import Pass
    from fluxc.ir.pipeline import Pipeline
    from fluxc.ir.sparse import SparseSettings

# The default order, checked against `runs_after` of every pass. A pipeline is a part of it.
ORDER = (
    "inline-regions",  # first: what follows looks at one flat graph
    "drop-asserts",  # before casts are read or changed, which the asserts forbid
    "group-experts",
    "drop-no-ops",  # before patterns are matched: nothing then stands between their nodes
    "canonicalize-attention",  # before positions: masks are made of positions too, and go here
    "expose-positions",
    "dead-code",  # also after any other pass
    "set-dtype",
    "place",
    "insert-routers",
    "route-attention",
    "apply-plan",
    "fold-pins",  # after the plan that pins them
    "soften-conditionals",  # for training alone: nothing that serves comes after it
    "lower-to-cond",  # fixes the batch to 1, so nothing that serves batches comes after it
    "merge-linears",  # before the phases part, so that all of them share the merged weights
    "drop-routers",
    "rope-per-request",
    "expose-kv",
    "insert-kv-cache",
    "insert-slot-cache",
    "insert-past",
    "append-turn",
    "fuse-swiglu",  # of the phases, not of what they come from: what is exported or trained is made of plain ops
    "fuse-add-rms-norm",  # after the rows that decode does not gather: the last norm then follows its sum
    "fuse-qk-norm-rope",  # after the cache, to write to it
    "outline-layers",  # last: its result is a module
    "split-phases",  # last as well
    "chunk-rows",  # of what split-phases leaves
    "last-rows",  # of the parts whose rows chunk-rows found to be free
)


def route_pipeline(
    *, pool: int = 100, seed: int = 0, sparse: SparseSettings | None = None, dump_dir: str | Path | None = None
) -> Pipeline:
    """From a captured to a routed program: `route_pipeline().run(program, "captured")`.

    `pool`: tokens the routers pool at each end of a prompt. `seed`: of their first weights. `sparse`: settings of all
    routable layers. `dump_dir`: a folder for numbered dumps.
    """
    from fluxc.ir.sparse import SparseSettings
    from fluxc.passes.dead_code import DeadCode
    from fluxc.passes.insert_routers import InsertRouters
    from fluxc.passes.route_attention import RouteAttention

    return watched([InsertRouters(pool, seed), RouteAttention(sparse or SparseSettings()), DeadCode()], dump_dir)


def soften_pipeline(*, straight_through: bool = False, dump_dir: str | Path | None = None) -> Pipeline:
    """From a routed program to the one that is trained: `soften_pipeline().run(program, "routed")`."""
    from fluxc.passes.soften_conditionals import SoftenConditionals

    return watched([SoftenConditionals(straight_through)], dump_dir)


def lower_pipeline(*, dump_dir: str | Path | None = None) -> Pipeline:
    """From a routed to a one-request program with conds: `lower_pipeline().run(program, "routed")`."""
    from fluxc.passes.dead_code import DeadCode
    from fluxc.passes.lower_to_cond import LowerToCond

    return watched([LowerToCond(), DeadCode()], dump_dir)


def prefill_pipeline(*, dense: bool = False, fuse: bool = False, dump_dir: str | Path | None = None) -> Pipeline:
    """From a routed program to its prefill: `prefill_pipeline().run(program, "routed")`. `dense`: without routers.

    `fuse` (also of the two below): with the fused ops of `kernels`, which engines on a GPU run.
    """
    from fluxc.passes.drop_routers import DropRouters
    from fluxc.passes.expose_kv import ExposeKV

    return watched([*([DropRouters()] if dense else []), ExposeKV(), *_fusions(fuse)], dump_dir)


def decode_pipeline(*, fuse: bool = False, dump_dir: str | Path | None = None) -> Pipeline:
    """From a routed program to its decode step: `decode_pipeline().run(program, "routed")`."""
    from fluxc.passes.drop_routers import DropRouters
    from fluxc.passes.insert_kv_cache import InsertKVCache
    from fluxc.passes.rope_per_request import RopePerRequest

    return watched([DropRouters(), RopePerRequest(), InsertKVCache(), *_fusions(fuse)], dump_dir)


def append_pipeline(*, fuse: bool = False, dump_dir: str | Path | None = None) -> Pipeline:
    """From a routed program to that of a further turn: `append_pipeline().run(program, "routed")`."""
    from fluxc.passes.append_turn import AppendTurn
    from fluxc.passes.drop_routers import DropRouters
    from fluxc.passes.rope_per_request import RopePerRequest

    return watched([DropRouters(), RopePerRequest(), AppendTurn(), *_fusions(fuse)], dump_dir)


def _fusions(wanted: bool) -> list[Pass]:
    from fluxc.passes.fuse_add_rms_norm import FuseAddRmsNorm
    from fluxc.passes.fuse_qk_norm_rope import FuseQkNormRope
    from fluxc.passes.fuse_swiglu import FuseSwiglu

    return [FuseSwiglu(), FuseAddRmsNorm(), FuseQkNormRope()] if wanted else []


def watched(passes: Sequence[Pass], dump_dir: str | Path | None = None) -> Pipeline:
    """A pipeline that verifies every result, and dumps it where a folder is given."""
    from fluxc.ir.observers import Dump, Verify
    from fluxc.ir.pipeline import Pipeline

    # The dump comes first: a program that fails to verify is the one worth reading.
    return Pipeline(passes, [*([Dump(dump_dir)] if dump_dir else []), Verify()])
