"""Pass `place`: the only pass that names a device. Moves a program, its weights and its constants to one device.

1. Every `device` argument of a call: the new device.
2. Weights, buffers and constants: moved (`weights=False` leaves them for a later bind).
3. Every fake value: on the new device, cond branches included.

    before: x = arange(n, device=cpu); y = add(x, b_offset)       # b_offset on cpu
    after:  x = arange(n, device=cuda); y = add(x, b_offset)      # b_offset on cuda
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fluxc.errors import OptionError
from fluxc.ir.graph import Draft, graph_modules
from fluxc.ir.pass_base import Note, Pass


@dataclasses.dataclass(frozen=True)
class Place(Pass):
    """Move a program to `device` ("cpu", "cuda", "cuda:1", "meta"). The count is of the values that moved.

    `weights=False` retargets the graph alone: the tensors stay where they are until real ones are bound.
    Raises OptionError for a device this machine does not have.
    """

    device: str = "cpu"
    weights: bool = True

    name: ClassVar[str] = "place"

    def rewrite(self, draft: Draft, notes: list[Note]) -> int:
        """Rename devices in calls, then move tensors and fake values."""
        device = _device(self.device, needed=self.weights)
        nodes = [node for module in graph_modules(draft.module) for node in module.graph.nodes]
        count = sum(_rename(node, device) for node in nodes)
        count += sum(_retarget_value(draft, node, device) for node in nodes)
        return count + (_move_weights(draft, device) if self.weights else 0)


def _device(text: str, *, needed: bool) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise OptionError(f"{text!r} is not a device", hint="use cpu, cuda or cuda:N") from error
    if needed and device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"this machine has no device {text!r}", hint="`fluxc doctor` lists what it has")
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def _rename(node: Node, device: torch.device) -> int:
    """Case 1."""
    if node.op != "call_function":
        return 0
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, dict(node.kwargs)))
    if args == node.args and kwargs == dict(node.kwargs):
        return 0
    node.args, node.kwargs = args, kwargs
    return 1


def _retarget_value(draft: Draft, node: Node, device: torch.device) -> int:
    """Case 3."""
    tensors = [t for t in pytree.tree_leaves(node.meta.get("val")) if isinstance(t, torch.Tensor)]
    if all(t.device == device for t in tensors):
        return 0
    with draft.fake_mode:
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, lambda t: _fake_on(t, device), node.meta["val"])
    return 1


def _fake_on(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Made anew, because a build without CUDA can describe tensors there, but not move one."""
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)


def _move_weights(draft: Draft, device: torch.device) -> int:
    """Case 2. Tensors that share memory still share it on the new device."""
    moved: dict[int, Any] = {}
    for tensors in (draft.state_dict, draft.constants):
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.device != device:
                tensors[name] = moved.setdefault(id(tensor), _moved(tensor, device))
    return len(moved)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach().to(device), requires_grad=tensor.requires_grad)
    return tensor.to(device)
