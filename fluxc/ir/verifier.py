"""What a program must look like at each stage (DESIGN section 4), checked on the result of every pass.

| stage | after | holds |
| --- | --- | --- |
| captured | capture, canonicalize | the captured signature; one `fluxc::attention` for each attention |
| scored | insert-routers | a router and a score for each routable attention; not yet used |
| routed | route-attention, apply-plan | the routed signature; `routed_attention` where it is routable |
| softened | soften-conditionals | both branches of each routable attention, mixed by weights; routers alone train |
| lowered | lower-to-cond | batch 1; a cond where it was routed |
| prefill | expose-kv | routed or captured, batch 1; keys and values among the outputs |
| decode | insert-kv-cache | length 1; every attention writes to the cache and reads it; no router |
| append | append-turn | a further turn: every attention reads the cache, then writes to it; no router |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.export.exported_program import ExportedProgram

from fluxc import kernels
from fluxc.errors import InternalError, VerifierError
from fluxc.ir.check_calls import call_problems
from fluxc.ir.check_conds import cond_problems
from fluxc.ir.check_kv import cache_problems, prefill_problems
from fluxc.ir.check_routes import attention_problems, route_problems, router_problems
from fluxc.ir.check_signature import signature_problems
from fluxc.ir.check_soft import soft_problems

Check = Callable[[ExportedProgram, str], Iterator[str]]

CHECKS: dict[str, tuple[Check, ...]] = {
    "captured": (signature_problems, call_problems, attention_problems),
    "scored": (signature_problems, call_problems, attention_problems, router_problems),
    "routed": (signature_problems, call_problems, attention_problems, router_problems, route_problems),
    "softened": (signature_problems, call_problems, attention_problems, router_problems, soft_problems),
    "lowered": (signature_problems, call_problems, attention_problems, router_problems, cond_problems),
    "prefill": (signature_problems, call_problems, attention_problems, prefill_problems),
    "decode": (signature_problems, call_problems, cache_problems),
    "append": (signature_problems, call_problems, cache_problems),
}


def problems(program: ExportedProgram, stage: str) -> list[str]:
    """Everything in which `program` breaks the rules of `stage`, with node names; [] for a valid program."""
    kernels.register()
    if stage not in CHECKS:
        raise InternalError(f"there is no stage {stage!r}; stages are {', '.join(CHECKS)}")
    return [problem for check in CHECKS[stage] for problem in check(program, stage)]


def verify(program: ExportedProgram, stage: str, after: str = "") -> None:
    """Raise VerifierError with all problems at once unless `program` is valid; `after` names the pass that made it."""
    found = problems(program, stage)
    if found:
        made = f" after {after}" if after else ""
        raise VerifierError(f"the program is not a valid {stage} program{made}: " + "; ".join(found))
