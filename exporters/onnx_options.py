"""Options of target `onnx`. Imports no ONNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fluxc.errors import OptionError
from fluxc.plan import Plan

OPSETS = range(18, 24)


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """`opset` of the standard operators. `profile`: portable uses standard operators alone; ort may use operators of
    ONNX Runtime's own where they are faster. `io`: hf writes `hf/` as well, a model with Hugging Face's names and a
    dense cache. `pins`: routes ("full", "sparse") of layers that are written without a conditional, by layer.
    `calibrated`, `eos_ids`: the plan and the end tokens of the model, for the files of hf. `fluxc.export` fills in the
    last three."""

    opset: int = 21
    profile: Literal["ort", "portable"] = "ort"
    io: Literal["engine", "hf"] = "engine"
    pins: Mapping[int, str] = dataclasses.field(default_factory=dict)
    calibrated: Plan | None = None
    eos_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise OptionError(f"opset {self.opset!r} is not in {OPSETS.start} to {OPSETS.stop - 1}")
        for name, allowed in (("profile", ("ort", "portable")), ("io", ("engine", "hf"))):
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")

    @property
    def recorded(self) -> dict[str, Any]:
        """What the manifest keeps of them."""
        return {"opset": self.opset, "profile": self.profile, "io": self.io}
