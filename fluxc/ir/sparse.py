"""What a layer does when its route is sparse: the attributes `kind`, `sink`, `window`, `last`, `decode_full`."""

from __future__ import annotations

import dataclasses

from fluxc.errors import OptionError
from fluxc.options import Options

KINDS = ("streaming", "triangle")


@dataclasses.dataclass(frozen=True)
class SparseSettings(Options):
    """Sparse attention of one layer (DESIGN section 1); sizes in tokens.

    `last`: rows at the end of the prompt that see all keys (triangle only). `decode_full`: rows after the prompt see
    all keys. Raises OptionError for an unknown kind or a size out of range.
    """

    kind: str = "streaming"
    sink: int = 128
    window: int = 2048
    last: int = 0
    decode_full: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"sparse kind {self.kind!r} is unknown", hint=f"Use one of {', '.join(KINDS)}")
        if self.sink < 0 or self.window < 1 or self.last < 0:
            raise OptionError(
                f"sink {self.sink}, window {self.window}, last {self.last} cannot be used",
                hint="sink and last are at least 0, window at least 1",
            )
        if self.kind == "streaming" and self.last:
            raise OptionError(f"streaming has no dense rows, but last is {self.last}", hint="Use the kind triangle")
