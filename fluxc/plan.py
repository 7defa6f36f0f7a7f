"""The plan: which sparse kind each routable layer has, and the biases that make the routers meet a budget.

`plan.json` is portable between machines: nothing measured about a device is in it (DESIGN section 4). Lists with one
entry a layer follow the routable layers in graph order, the axis L of `route_bias`, `routes` and `scores`.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fluxc.budget import check_budget
from fluxc.errors import FluxcError, OptionError, PlanError
from fluxc.json_form import dump, parse, read_text, strict
from fluxc.model_info import ModelInfo
from fluxc.options import canonical_digest

if TYPE_CHECKING:
    import torch

    from fluxc.ir.sparse import SparseSettings

FORMAT = 1
KINDS = ("streaming", "triangle", "block")
FULL_KINDS = ("dense", "block")
PINS = (None, "full", "sparse")
DECODE = ("sparse", "full")


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One routable layer: the sparse kind it falls back to, sizes in tokens, and a pin that overrides its router.

    `last` is the number of dense rows at the end of the prompt (triangle only, else 0). `full_kind`: a full route reads
    all keys (dense), or scored blocks in the prompt (block). `block`, `stride` and `threshold` choose the blocks of the
    kind or the full kind block, and are 0 for others.
    """

    layer: int
    kind: Literal["streaming", "triangle", "block"]
    sink: int
    window: int
    last: int = 0
    pin: Literal["full", "sparse"] | None = None
    block: int = 0
    stride: int = 0
    threshold: float = 0.0
    full_kind: Literal["dense", "block"] = "dense"

    def __post_init__(self) -> None:
        where = f"layer {self.layer} of the plan"
        _require(self.kind in KINDS, f"{where}: sparse kind {self.kind!r} is not one of {', '.join(KINDS)}")
        _require(self.pin in PINS, f"{where}: pin {self.pin!r} is not full, sparse or null")
        for name, least in (("layer", 0), ("sink", 0), ("window", 1), ("last", 0)):
            value = getattr(self, name)
            _require(_is_int(value) and value >= least, f"{where}: {name} {value!r} is not an integer >= {least}")
        _require((self.last > 0) == (self.kind == "triangle"), f"{where}: last {self.last} with kind {self.kind!r}")
        _require(self.full_kind in FULL_KINDS, f"{where}: full kind {self.full_kind!r} is not dense or block")
        kinds = f"kind {self.kind!r}" + (" and full kind 'block'" if self.full_kind == "block" else "")
        _require(
            (self.block > 0) == ("block" in (self.kind, self.full_kind)), f"{where}: block {self.block} with {kinds}"
        )

    def settings(self, decode_full: bool) -> SparseSettings:
        """The attributes of the layer's routed attention; raises PlanError for sizes that do not fit its kind."""
        from fluxc.ir.sparse import SparseSettings

        sizes = (self.kind, self.sink, self.window, self.last, decode_full)
        try:
            return SparseSettings(*sizes, self.block, self.stride, self.threshold, self.full_kind)
        except OptionError as error:
            raise PlanError(f"layer {self.layer} of the plan: {error}") from error

    @property
    def keys(self) -> int:
        """Keys a sparse row sees, and slots a sparse layer keeps: sink + window."""
        return self.sink + self.window


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """The biases, one a routable layer, that keep the mean full share at `budget` on the calibration prompts."""

    budget: float
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", tuple(self.bias))
        check_budget(self.budget)
        finite = all(_is_finite(value) for value in self.bias)
        _require(finite, f"the plan's curve at budget {self.budget:g}: a bias is not a finite number")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A calibrated routing plan.

    `budget` is the selected one, `achieved` what held-out prompts showed, by budget (see `achieved_at`), `calibration`
    what it was made from (seed, effort, prompts, corpus hash, options digest, versions). `curve` is sorted by budget,
    and no bias falls along it, so the routes of a smaller budget are a subset of those of a larger one.
    """

    model: ModelInfo
    pool: int
    decode: Literal["sparse", "full"]
    layers: tuple[LayerPlan, ...]
    curve: tuple[CurvePoint, ...]
    budget: float
    achieved: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "curve", tuple(self.curve))
        _require(_is_int(self.pool) and self.pool > 0, f"the plan's pool {self.pool!r} is not a positive integer")
        _require(self.decode in DECODE, f"the plan's decode {self.decode!r} is not sparse or full")
        _check_layers(self)
        _check_curve(self)
        self.bias()

    def bias(self, budget: float | None = None) -> list[float]:
        """One bias a layer at `budget` (None: the selected one), linear between the curve's points.

        Budget 0 is -inf and budget 1 is +inf in every layer; pins override both. Raises PlanError for a budget
        outside 0..1 or outside the curve.
        """
        budget = check_budget(self.budget if budget is None else budget)
        ends = [math.inf if budget else -math.inf] * len(self.layers)
        values = self._between(budget) if 0 < budget < 1 else ends
        pins = {"full": math.inf, "sparse": -math.inf}
        return [pins.get(layer.pin or "", value) for layer, value in zip(self.layers, values, strict=True)]

    def _between(self, budget: float) -> list[float]:
        budgets = [point.budget for point in self.curve]
        if not budgets[0] <= budget <= budgets[-1]:
            raise PlanError(
                f"budget {budget:g} is outside what this plan was calibrated for ({budgets[0]:g} to {budgets[-1]:g})",
                hint="take 0, 1 or a budget between these",
            )
        at = bisect.bisect_right(budgets, budget)
        low, high = self.curve[at - 1], self.curve[min(at, len(budgets) - 1)]
        share = (budget - low.budget) / (high.budget - low.budget) if high is not low else 0.0
        # `min` keeps rounding from passing the upper point: biases must not fall as the budget grows.
        return [min(b, a + (b - a) * share) for a, b in zip(low.bias, high.bias, strict=True)]

    def route_bias(self, budget: float | Sequence[float] | None = None, batch: int = 1) -> torch.Tensor:
        """The program's input `route_bias`, f32[L,batch]; `budget` may be one number a request."""
        import torch

        budgets = list(budget) if isinstance(budget, Sequence) else [budget] * batch
        _require(len(budgets) == batch, f"{len(budgets)} budgets for a batch of {batch}")
        return torch.tensor([self.bias(b) for b in budgets], dtype=torch.float32).T.contiguous()

    def with_budget(self, budget: float) -> Plan:
        """The plan with another budget selected; what was verified for each budget stays."""
        return self if budget == self.budget else dataclasses.replace(self, budget=budget)

    def achieved_at(self, budget: float | None = None) -> dict[str, Any]:
        """What held-out prompts showed at `budget` (None: the selected one); empty where it was not verified."""
        return dict(self.achieved.get(f"{self.budget if budget is None else budget:g}", {}))

    def kv_slots(self, routes: Iterable[Any], seq_len: int) -> dict[int, int]:
        """KV slots of one request by attention layer, all attentions of the model. `routes`: bool[L], True is full.

        A full layer keeps `seq_len`, a sparse one min(seq_len, sink + window) unless `decode` is full, a layer with a
        window of its own min(seq_len, window).
        """
        flags = [bool(route) for route in routes]
        _require(len(flags) == len(self.layers), f"{len(flags)} routes for {len(self.layers)} routable layers")
        keep = {
            layer.layer: seq_len if full or self.decode == "full" else layer.keys
            for layer, full in zip(self.layers, flags, strict=True)
        }
        return {a.layer: min(seq_len, keep.get(a.layer, a.window)) for a in self.model.attentions}

    def kv_bytes(self, routes: Iterable[Any], seq_len: int) -> int:
        """Bytes of KV one request of `seq_len` tokens keeps under `routes`."""
        slots = self.kv_slots(routes, seq_len)
        numbers = sum(slots[a.layer] * a.kv_heads * (a.key_dim + a.value_dim) for a in self.model.attentions)
        return numbers * self.model.element_bytes

    def check_model(self, model: ModelInfo) -> None:
        """Raise PlanError, with the first difference, unless the plan was made for `model`."""
        reason = model.difference(self.model)
        if reason:
            raise PlanError(f"the plan belongs to another model: {reason}", hint="calibrate this model")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; a layer without blocks does not name their sizes, nor a dense one its full kind."""
        values = dataclasses.asdict(self)
        for layer in values["layers"]:
            if not layer["block"]:
                for name in ("block", "stride", "threshold"):
                    del layer[name]
            if layer["full_kind"] == "dense":
                del layer["full_kind"]
        return values

    def to_json(self) -> str:
        """The text of `plan.json`; raises PlanError where a free-form part is no JSON."""
        return dump(self.to_dict(), PlanError, "the plan")

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the canonical JSON form."""
        self.to_json()
        return canonical_digest(self.to_dict())

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        """From JSON values; raises PlanError for unknown keys, missing keys and a newer format."""
        if isinstance(values, dict):
            check_format(values.get("format"), PlanError)
            values = {**values, "model": ModelInfo.from_dict(values.get("model"))}
            values["layers"] = _each(LayerPlan, values.get("layers"), "a layer of the plan")
            values["curve"] = _each(CurvePoint, values.get("curve"), "a curve point of the plan")
        return strict(cls, values, PlanError, "the plan")

    @classmethod
    def from_json(cls, text: str, where: str = "the plan") -> Plan:
        """From the text of `plan.json`; raises PlanError."""
        return cls.from_dict(parse(text, PlanError, where))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; raises PlanError, naming the file."""
        return cls.from_json(read_text(Path(path), PlanError), str(path))


def default_crossover(plan: Plan) -> int:
    """The length in tokens below which prompts run dense where nothing was measured: twice a sparse row's keys."""
    return 2 * max(layer.keys for layer in plan.layers)


def check_format(found: Any, error: type[FluxcError], where: str = "the plan") -> None:
    """Raise `error` unless `found` is the format number this version of fluxc writes."""
    if _is_int(found) and found > FORMAT:
        raise error(f"{where} has format {found}, newer than {FORMAT}", hint="update fluxc")
    if found != FORMAT:
        raise error(f"{where} has no valid format number ({found!r})")


def _check_layers(plan: Plan) -> None:
    _require(bool(plan.layers), "the plan has no routable layer")
    mine, model = tuple(layer.layer for layer in plan.layers), plan.model.routable
    _require(mine == model, f"the plan's layers {list(mine)} are not the model's routable layers {list(model)}")


def _check_curve(plan: Plan) -> None:
    _require(bool(plan.curve), "the plan's curve is empty")
    for point in plan.curve:
        count = len(point.bias)
        _require(count == len(plan.layers), f"{count} biases at budget {point.budget:g} for {len(plan.layers)} layers")
    for low, high in itertools.pairwise(plan.curve):
        _require(low.budget < high.budget, "the plan's curve is not sorted by budget")
        falls = any(a > b for a, b in zip(low.bias, high.bias, strict=True))
        _require(not falls, f"a bias falls between budgets {low.budget:g} and {high.budget:g} of the plan's curve")


def _each(cls: type[Any], values: Any, where: str) -> tuple[Any, ...]:
    _require(isinstance(values, (list, tuple)), f"the list with {where} is missing")
    return tuple(strict(cls, value, PlanError, where) for value in values)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(message)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
