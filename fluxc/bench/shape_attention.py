"""Time of the attention calls alone inside one decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from fluxc.runtime.clock import now


def attention_seconds(step: GraphModule, inputs: Sequence[Tensor], device: str) -> float:
    """Seconds of all decode_attention calls of `step`, on the values they have for `inputs`."""
    calls = _Calls(step)
    calls.run(*inputs)
    return _seconds(lambda: [op(*args, **kwargs) for op, args, kwargs in calls.found], device)


class _Calls(Interpreter):
    """Runs a decode program once and keeps its attention calls with their values."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[Any, Any, Any]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """See Interpreter."""
        if "decode_attention" in str(target):
            self.found.append((target, args, kwargs))
        return super().call_function(target, args, kwargs)


def _seconds(run: Callable[[], Any], device: str, repeats: int = 20) -> float:
    """Mean seconds of a run; on a GPU of its recorded graph, which leaves no gaps between small kernels."""
    run()
    again = run if device == "cpu" else _recorded(run)
    again()
    start = now(device)
    for _ in range(repeats):
        again()
    return (now(device) - start) / repeats


def _recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
