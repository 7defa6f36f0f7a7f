"""The suites of the kernel benchmark by name, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fluxc.errors import UserError

GPU_SUITES = ("prefill", "routed", "blocks", "decode", "append", "router", "backward", "fused", "full-precision")
CPU_SUITES = ("prefill", "decode")
CPU_LENGTHS = (1024, 2048, 4096, 8192)
GPU_LENGTHS = (8192, 16384, 32768, 131072, 262144)


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What a run measures.

    `lengths`: tokens, empty for those of the suite. `flex`: also compile FlexAttention (prefill up to 128K).
    `variants`: also time our kernels with other tile sizes. `rounds`, `clock` (wall, or cpu: time of this process
    only) and `threads` (0: torch's choice) are for the CPU.
    """

    suites: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    flex: bool = False
    variants: bool = False
    rounds: int = 7
    clock: str = "wall"
    threads: int = 0


def run(device: str, options: BenchOptions) -> Iterator[dict[str, Any]]:
    """Rows as they are measured, each with its suite. A contender whose check fails gets no time.

    Raises UserError for a suite the device does not have.
    """
    known = GPU_SUITES if device == "cuda" else CPU_SUITES
    for suite in options.suites or known:
        if suite not in known:
            raise UserError(f"there is no suite {suite!r} on {device}", hint=f"choose one of {', '.join(known)}")
        rows = _on_gpu(suite, options) if device == "cuda" else _on_cpu(suite, options)
        yield from ({"suite": suite, **row} for row in rows)


def conditions(device: str, options: BenchOptions) -> dict[str, Any]:
    """Machine, versions, and how it was timed."""
    if device == "cuda":
        from fluxc.kernels.bench import measure

        return measure.conditions()
    from fluxc.kernels.bench import cpu

    return cpu.conditions(options.clock, options.rounds)


def _on_cpu(suite: str, options: BenchOptions) -> Iterator[dict[str, Any]]:
    import torch

    from fluxc.kernels.bench import cpu

    if options.threads:
        torch.set_num_threads(options.threads)
    measured = cpu.prefill if suite == "prefill" else cpu.decode
    yield from measured(options.lengths or CPU_LENGTHS, options.rounds, options.clock)


def _on_gpu(suite: str, options: BenchOptions) -> Iterator[dict[str, Any]]:
    from fluxc.kernels.bench import (
        append,
        backward,
        blocks,
        cases,
        decode,
        full_precision,
        fused,
        prefill,
        routed,
        router,
        writes,
    )

    shapes = (cases.Shape(), cases.SMOLLM2)
    if suite == "prefill":
        chosen = [case for case in cases.PREFILL if case.length in (options.lengths or GPU_LENGTHS)]
        yield from prefill.measure(chosen, (32768, 131072) if options.flex else (), options.variants)
    elif suite in ("decode", "router"):
        for shape in shapes:
            yield from decode.measure(shape, options.variants) if suite == "decode" else router.measure(shape, 8192)
    elif suite == "append":
        for shape in shapes:
            yield from append.measure(shape)
            yield from writes.measure(shape)
    elif suite == "blocks":
        yield from blocks.measure(options.variants)
    elif suite == "backward":
        yield from backward.measure(options.variants)
    else:
        yield from {
            "routed": routed,
            "fused": fused,
            "full-precision": full_precision,
        }[suite].measure()
