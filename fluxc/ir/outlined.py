"""A program cut into parts that are called one after another: prologue, one part for each decoder layer, epilogue.

A part is a GraphModule. Values travel between parts by name: program inputs and what earlier parts leave. That makes
it possible to keep the values that enter a layer and to run again from there, to checkpoint layer by layer, and to
wrap or compile layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fluxc.errors import InternalError


@dataclasses.dataclass(frozen=True)
class Interface:
    """What one part reads and leaves, by value name, in argument order.

    `weights` maps the names of its parameters and buffers to those in the program. For a layer: `layer` is its
    attention's index in the model, `hidden` the values it hands on to later layers or the head, `route` and `score`
    the names of bool[B] and f32[B], "" where it has no router.
    """

    enters: tuple[str, ...]
    leaves: tuple[str, ...]
    weights: dict[str, str]
    layer: int | None = None
    hidden: tuple[str, ...] = ()
    route: str = ""
    score: str = ""


@dataclasses.dataclass(frozen=True)
class State:
    """The values that enter layer `layer` of an outlined program (`layer` = number of layers: the epilogue)."""

    layer: int
    inputs: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A live value by name, program inputs included."""
        return self.inputs[name] if name in self.inputs else self.values[name]


class Outlined(nn.Module):
    """The program as prologue, layers and epilogue; calling it is calling the program, bit for bit.

    `inputs`: names of the program's inputs in order. `interfaces`: one for each layer. Parameters are the program's
    own objects. With `checkpointing`, layers recompute their activations in the backward pass.
    """

    def __init__(
        self, parts: Sequence[GraphModule], interfaces: Sequence[Interface], inputs: Sequence[str], single: bool
    ) -> None:
        super().__init__()
        self.prologue, self.layers, self.epilogue = parts[0], nn.ModuleList(parts[1:-1]), parts[-1]
        self.interfaces = tuple(interfaces[1:-1])
        self.inputs = tuple(inputs)
        self.checkpointing = False
        self._all = tuple(interfaces)
        self._single = single

    def forward(self, *inputs: Tensor) -> Any:
        """The program's outputs for positional inputs in signature order: one as itself, several as a tuple."""
        return self.finish(self.start(*inputs))

    def start(self, *inputs: Tensor) -> State:
        """Run the prologue: the state that enters layer 0."""
        if len(inputs) != len(self.inputs):
            raise InternalError(f"{len(inputs)} inputs given, the program has {len(self.inputs)}")
        state = State(-1, dict(zip(self.inputs, inputs, strict=True)), {})
        return self._step(state, self.prologue)

    def advance(self, state: State, to: int) -> State:
        """Run layers `state.layer` to `to` - 1: the state that enters layer `to`. The given state stays usable."""
        if not state.layer <= to <= len(self.layers):
            raise InternalError(f"cannot run from layer {state.layer} to layer {to} of {len(self.layers)}")
        for layer in self.layers[state.layer : to]:
            state = self._step(state, layer)
        return state

    def finish(self, state: State) -> Any:
        """Run the remaining layers and the epilogue: the program's outputs."""
        state = self.advance(state, len(self.layers))
        outputs = self.epilogue(*(state[name] for name in self._all[-1].enters))
        return outputs[0] if self._single else tuple(outputs)

    def with_inputs(self, state: State, **inputs: Tensor) -> State:
        """The state with other program inputs, for what is still to run.

        Raises InternalError for an input that a part has read that ran already. `route_bias` is the exception: rows
        of layers that ran have had their effect.
        """
        read = {name for interface in self._all[: state.layer + 1] for name in interface.enters}
        for name in inputs:
            if name not in self.inputs or (name in read and name != "route_bias"):
                raise InternalError(f"input {name!r} cannot change before layer {state.layer}: it was read already")
        return dataclasses.replace(state, inputs={**state.inputs, **inputs})

    def parameter_names(self) -> dict[str, str]:
        """From names of this module's parameters and buffers to their names in the program's state dict."""
        prefixes = ["prologue.", *(f"layers.{index}." for index in range(len(self.layers))), "epilogue."]
        return {
            prefix + local: name
            for prefix, interface in zip(prefixes, self._all, strict=True)
            for local, name in interface.weights.items()
        }

    def _step(self, state: State, part: nn.Module) -> State:
        interface = self._all[state.layer + 1]
        args = [state[name] for name in interface.enters]
        recompute = self.checkpointing and torch.is_grad_enabled() and state.layer >= 0
        left = checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False) if recompute else part(*args)
        values = {**state.values, **dict(zip(interface.leaves, left, strict=True))}
        return State(state.layer + 1, state.inputs, self._live(values, state.layer + 1))

    def _live(self, values: dict[str, Any], layer: int) -> dict[str, Any]:
        needed = {name for interface in self._all[layer + 1 :] for name in interface.enters}
        return {name: value for name, value in values.items() if name in needed}
