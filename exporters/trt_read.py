"""Reads a built TensorRT engine back: which conditionals it holds, and how large its tensors can get.

Opening an engine needs a GPU it runs on. Where there is none, the plan itself is read: TensorRT-RTX 1.7 keeps the
host's program in it as text (`cjmp` a conditional jump, `region` a stretch of device memory at the largest shapes),
with the ONNX node of each part. The form is not documented: where it is not found, nothing counts as read.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

_JUMP = re.compile(rb'cjmp=\{ name="[^"\n]*" [^\n]{0,4000}?layers="\[ONNX Layer: ([^"\n]*)\]" \}')
_REGION = re.compile(rb"region = \{ name=devmem\S* size=(\d+) ")
_BRANCHES = ("then_branch", "else_branch")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an engine holds. `source`: "inspector", "plan" or "" where it could not be read. `conditionals`: calls of
    routed attentions with a conditional jump. `largest_region`: bytes of the largest stretch of
    memory (a tensor, or the library's workspace of 8 MB), 0 where not known."""

    source: str
    conditionals: tuple[str, ...]
    largest_region: int


def read(engine: Path, calls: Iterable[str], inspected: Path | None = None) -> Reading:
    """Read `engine`; `calls` are the names of the ONNX nodes that call a routed attention."""
    if inspected is not None and inspected.is_file():
        return Reading("inspector", _inspected(inspected.read_text(encoding="utf-8"), calls), 0)
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        jumps = {match[1].decode(errors="replace") for match in _JUMP.finditer(plan)}
        regions = [int(match[1]) for match in _REGION.finditer(plan)]
    if not jumps and not regions:
        return Reading("", (), 0)
    found = tuple(name for name in calls if any(_is_of(name, jump) for jump in jumps))
    return Reading("plan", found, max(regions, default=0))


def _is_of(call: str, origin: str) -> bool:
    """Whether `origin`, ONNX nodes from the inside out, ends in this call of a routed attention."""
    return re.search(rf"(^|\| ){re.escape(call)} \(routed_", origin) is not None


def _inspected(text: str, calls: Iterable[str]) -> tuple[str, ...]:
    """Calls both of whose branches have parts in the engine."""
    parts = [line for line in _strings(json.loads(text)) if "_branch)" in line]
    return tuple(
        name for name in calls if all(any(b in part and _is_of(name, part) for part in parts) for b in _BRANCHES)
    )


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return re.findall(r"\[ONNX Layer: ([^\]]*)\]", value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [line for each in inside for line in _strings(each)]
