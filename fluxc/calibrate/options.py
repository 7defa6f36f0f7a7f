"""Options of calibration, and what each effort level measures."""

from __future__ import annotations

import dataclasses
from typing import Any

from fluxc.budget import check_budget
from fluxc.errors import OptionError
from fluxc.ir.sparse import FULL_KINDS, SparseSettings
from fluxc.options import Options

KINDS = ("auto", "streaming", "triangle", "block")
LARGEST_BLOCK, STRIDES = 128, 8
DECODE = ("sparse", "full")


@dataclasses.dataclass(frozen=True)
class Effort:
    """What one level of effort spends, and what it gives up against the next."""

    measured: int
    """Prompts whose needs are measured by forward and backward passes."""
    gradients: tuple[float, ...]
    """Shares of SA at which gradients are taken (fluxc.calibrate.needs)."""
    pooled: int
    """Short prompts that only show the routers more pooled queries."""
    heldout: int
    """Prompts of the held-out split on which budget and losses are verified."""
    compared: int
    """Measured prompts on which sparse kinds are compared."""
    left_out: int
    """Measured prompts on which every layer is also left out, one at a time."""
    lengths: tuple[int, ...]
    """Prompt lengths, in sixteenths of the shortest valid one."""
    gives_up: str


EFFORTS = {
    "quick": Effort(
        9, (0.5,), 18, 9, 2, 0, (16,), "one gradient point, 9 prompts measured and 9 held out, no leave-one-out"
    ),
    "normal": Effort(13, (0.0, 0.5), 72, 27, 4, 1, (16,), "two gradient points, prompts of one length"),
    "thorough": Effort(45, (0.0, 0.5, 1.0), 180, 54, 12, 6, (16, 24, 32), "nothing"),
}


@dataclasses.dataclass(frozen=True)
class CalibrateOptions(Options):
    """How a model is calibrated. Sizes in tokens; None takes the default for the model's context."""

    budget: float = 0.4
    """Largest mean share of routable layers that run full, 0..1."""
    sparse_kind: str = "auto"
    """auto (the better of streaming and triangle) | streaming | triangle | block."""
    sink: int | None = None
    window: int | None = None
    decode: str = "sparse"
    """What rows after the prompt see on a sparse layer: sparse (ring KV) | full."""
    threshold: float = 0.9
    """Share of the predicted weight that the blocks read by the kind block, sparse or full, hold, 0..1."""
    full_kind: str = "dense"
    """What prompts read where a layer runs full: dense (all keys) | block (kept only where it hardly loses)."""
    effort: str = "normal"
    """quick | normal | thorough."""
    seed: int = 0
    pool: int = 100
    """Tokens of the prompt's start and of its end that the router looks at (METHOD section 1)."""

    def __post_init__(self) -> None:
        check_budget(self.budget)
        _one_of("sparse kind", self.sparse_kind, KINDS)
        _one_of("decode", self.decode, DECODE)
        if self.sparse_kind == "block" and self.decode != "full":
            raise OptionError("the kind block keeps all keys and values", hint="choose --decode full with it")
        _one_of("full kind", self.full_kind, FULL_KINDS)
        if self.full_kind == self.sparse_kind:
            raise OptionError(
                "the sparse kind and the full kind are both block: routes would make no difference",
                hint="choose --full-kind dense, or another --sparse-kind",
            )
        if not 0 < self.threshold <= 1:
            raise OptionError(f"block threshold is {self.threshold}", hint="it must lie in 0..1, above 0")
        _one_of("effort", self.effort, tuple(EFFORTS))
        for name, least in (("sink", 0), ("window", 1), ("pool", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}", hint=f"it must be at least {least}")

    def settings(self, context: int, kind: str, last: int) -> SparseSettings:
        """Sparse attention of `kind` with the sizes for a context; `last` dense rows in the kind triangle.

        Full layers are dense.
        """
        sink, window = self.sizes(context)
        decode_full, last = self.decode == "full", last if kind == "triangle" else 0
        if kind != "block":
            return SparseSettings(kind, sink, window, last, decode_full)
        return SparseSettings(kind, sink, window, 0, decode_full, **self._blocks(window))

    def with_full_blocks(self, settings: SparseSettings) -> SparseSettings:
        """These settings with full layers that read scored blocks."""
        return dataclasses.replace(settings, full_kind="block", **self._blocks(settings.window))

    def _blocks(self, window: int) -> dict[str, Any]:
        """Blocks of a sixteenth of the window, 16 to 128 tokens, scored an eighth of their size at a time."""
        block = min(LARGEST_BLOCK, max(16, 1 << (window // 16).bit_length() - 1))
        return {"block": block, "stride": block // STRIDES, "threshold": self.threshold}

    def sizes(self, context: int) -> tuple[int, int]:
        """Sink and window: 128 + 2048 for contexts of 32K and more, 64 + 1024 from 8K, else shares of the context.

        Raises OptionError where no valid prompt, twice sink + window long, fits into the context.
        """
        if context >= 32768:
            sink, window = 128, 2048
        elif context >= 8192:
            sink, window = 64, 1024
        else:
            sink, window = max(1, context // 128), max(1, context // 8)
        sink = sink if self.sink is None else self.sink
        window = window if self.window is None else self.window
        if 2 * (sink + window) > context:
            raise OptionError(
                f"sink {sink} and window {window} are too large for a context of {context} tokens",
                hint="calibration needs prompts of twice their sum: choose a smaller --window",
            )
        return sink, window


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"unknown {name} {value!r}", hint=f"choose one of {', '.join(known)}")
