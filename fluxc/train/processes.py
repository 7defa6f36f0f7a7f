"""Data parallel over several processes (torchrun, accelerate launch), or one process alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: str = "cpu") -> Iterator[Processes]:
    """The processes that a launcher started with this one, joined while the block runs; a group set up before stays.

    On GPUs each process takes the one of its local rank.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not launched or distributed.is_initialized():
        yield Processes(device)
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(device)
    finally:
        distributed.destroy_process_group()


class Processes:
    """The processes that train together; torch.distributed's default group where one was set up, else this one."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._many = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if self._many else 0
        self.count = distributed.get_world_size() if self._many else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self._many:
            distributed.barrier()

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a global batch: every n-th of n processes."""
        return list(items[self.rank :: self.count])

    def total(self, value: Tensor) -> Tensor:
        """Sum over all processes."""
        if self._many:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def most(self, value: int) -> int:
        """The largest of the processes' numbers."""
        if not self._many:
            return value
        held = torch.tensor(value, device=self.device)
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
        return int(held)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the sum of all gradients, in one message."""
        if not self._many:
            return
        live = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in live]
        flat = self.total(torch.cat([grad.flatten() for grad in grads]))
        for parameter, grad in zip(live, flat.split([p.numel() for p in live]), strict=True):
            parameter.grad = grad.view_as(parameter)
