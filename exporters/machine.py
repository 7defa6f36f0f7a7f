"""The machine that native code was built for: recorded in an engine, compared before it is loaded. Imports no torch."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxc.errors import ArchiveError, TargetError

CPUINFO = Path("/proc/cpuinfo")
# What a compiler told to build for this very processor may use.
_INSTRUCTIONS = re.compile(
    r"sse\w*|ssse3|avx\w*|fma|f16c|bmi\d|amx\w*|vaes|vpclmulqdq|gfni|movbe|popcnt|abm|adx|aes|pclmulqdq|sha_ni|"
    r"asimd\w*|sve\w*|i8mm|bf16|sm\d|fphp|atomics"
)
_SHOWN = 3


def this_machine() -> dict[str, str]:
    """System, architecture, and the instruction sets of the processor, separated by spaces."""
    return {"system": platform.system(), "architecture": platform.machine(), "instructions": " ".join(_instructions())}


def check_machine(built_for: Mapping[str, Any], where: Path) -> None:
    """Raise TargetError where native code built for one machine cannot run on this one; ArchiveError if unreadable."""
    here = this_machine()
    if not isinstance(built_for, dict) or not all(isinstance(built_for.get(key), str) for key in here):
        raise ArchiveError(f"{where} does not say which machine it was built for", hint="export it again")
    for key in ("system", "architecture"):
        if built_for[key] != here[key]:
            raise _refusal(where, built_for[key], here[key])
    missing = sorted(set(built_for["instructions"].split()) - set(here["instructions"].split()))
    if missing:
        names = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise _refusal(where, f"a processor with {names}", "one without")


def check_torch(built_with: str, running: str, where: Path) -> None:
    """Raise TargetError where a package was built with another minor version of torch than runs it."""
    if built_with.split(".")[:2] != running.split(".")[:2]:
        raise _refusal(where, f"torch {built_with}", f"torch {running}")


def _refusal(where: Path, built_for: str, here: str) -> TargetError:
    return TargetError(
        f"{where} was built for {built_for}, this is {here}", hint="export the model again on this machine"
    )


def _instructions() -> list[str]:
    if not CPUINFO.is_file():
        return []
    lines = CPUINFO.read_text(errors="replace").splitlines()
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return sorted(flag for flag in flags.split() if _INSTRUCTIONS.fullmatch(flag))
