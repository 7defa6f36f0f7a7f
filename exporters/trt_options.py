"""Options of target `trt`. Imports no TensorRT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from fluxc.errors import OptionError

DEFAULT_LENGTH = 8192


@dataclasses.dataclass(frozen=True)
class TrtOptions:
    """`attention`: decomposed, or fused (TensorRT's own attention; experimental). `plan`: conditional, or split (an
    engine with all layers full and one with all sparse; the host chooses). `allow_partial`: keep an engine in which
    not every routable layer became a conditional. `time_limit`: seconds for each engine. `max_length`: longest prompt
    with its answer, in tokens; 0: the model's `context` (0: unknown), which `fluxc.export` fills in. `batch`: most
    requests of one decode step. `keep_onnx`: leave the ONNX files in the directory, to build again with another
    version of TensorRT. `pins`: routes of folded layers, by model layer."""

    attention: Literal["decomposed", "fused"] = "decomposed"
    plan: Literal["conditional", "split"] = "conditional"
    allow_partial: bool = False
    time_limit: float = 3600.0
    max_length: int = 0
    batch: int = 8
    keep_onnx: bool = False
    context: int = 0
    pins: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in (("attention", ("decomposed", "fused")), ("plan", ("conditional", "split"))):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if (self.attention, self.plan) == ("fused", "conditional"):
            raise OptionError(
                "TensorRT-RTX 1.7 does not build its fused attention inside a conditional", hint="add --plan split"
            )
        if self.time_limit <= 0:
            raise OptionError(f"a time limit of {self.time_limit:g} s is no time")
        if self.max_length < 0 or self.batch < 1:
            raise OptionError(f"max_length {self.max_length} or batch {self.batch} is too small")

        if self.context and self.length > self.context:
            raise OptionError(f"max_length {self.length} is above the model's context of {self.context} tokens")

    @property
    def length(self) -> int:
        """Tokens the engines take."""
        return self.max_length or self.context or DEFAULT_LENGTH
