"""What a routed layer does: `kind`, its sizes and `decode_full` where its route is sparse, `full_kind` where full."""

from __future__ import annotations

import dataclasses
from typing import Any

from fluxc.errors import OptionError
from fluxc.options import Options

KINDS = ("streaming", "triangle", "block")
FULL_KINDS = ("dense", "block")


@dataclasses.dataclass(frozen=True)
class SparseSettings(Options):
    """Sparse and full attention of one routed layer (DESIGN section 1); sizes in tokens.

    `last`: rows at the end of the prompt that see all keys (triangle only). `decode_full`: rows after the prompt see
    all keys, which the kind block needs. `block`, `stride`, `threshold`: how that kind chooses the blocks it reads
    (fluxc::block_scores); else 0. For it sink + window only says which prompts are long enough to calibrate on.
    `full_kind`: where the route is full, prompts see all keys (dense) or scored blocks, chosen by the same three sizes
    (block, not with the kind block); KV is kept whole and rows after the prompt see all keys either way.
    Raises OptionError for an unknown kind or a size out of range.
    """

    kind: str = "streaming"
    sink: int = 128
    window: int = 2048
    last: int = 0
    decode_full: bool = False
    block: int = 0
    stride: int = 0
    threshold: float = 0.0
    full_kind: str = "dense"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"sparse kind {self.kind!r} is unknown", hint=f"Use one of {', '.join(KINDS)}")
        if self.sink < 0 or self.window < 1 or self.last < 0:
            raise OptionError(
                f"sink {self.sink}, window {self.window}, last {self.last} cannot be used",
                hint="sink and last are at least 0, window at least 1",
            )
        self._check_blocks()
        if self.kind == "block" and self.last:
            raise OptionError(f"block has no dense rows, but last is {self.last}", hint="Use the kind triangle")
        if self.kind == "streaming" and self.last:
            raise OptionError(f"streaming has no dense rows, but last is {self.last}", hint="Use the kind triangle")

    def attributes(self) -> dict[str, Any]:
        """Keywords of a routed_attention node, without `full_kind` where it is the schema's default."""
        values = self.to_dict()
        return values if self.full_kind != "dense" else {n: v for n, v in values.items() if n != "full_kind"}

    def _check_blocks(self) -> None:
        if self.full_kind not in FULL_KINDS:
            raise OptionError(f"full kind {self.full_kind!r} is unknown", hint=f"Use one of {', '.join(FULL_KINDS)}")
        if self.full_kind == self.kind:
            raise OptionError(
                "the sparse kind and the full kind are both block: routes would make no difference",
                hint="Use the full kind dense, or another sparse kind",
            )
        if "block" not in (self.kind, self.full_kind):
            if self.block or self.stride or self.threshold:
                raise OptionError(f"{self.kind} has no blocks, but block is {self.block}", hint="Use the kind block")
            return
        if self.block < 16 or self.block & (self.block - 1) or self.stride < 1 or self.block % self.stride:
            raise OptionError(
                f"block {self.block}, stride {self.stride} cannot be used",
                hint="block is a power of two, at least 16, and stride divides it",
            )
        if not 0 < self.threshold <= 1:
            raise OptionError(f"block threshold is {self.threshold}", hint="it lies in 0..1, above 0")
        if self.kind == "block" and not self.decode_full:
            raise OptionError("the kind block keeps all keys and values", hint="Use it with decode full")
