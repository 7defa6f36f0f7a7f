"""How large the pool of pages is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fluxc.engine import demand
from fluxc.engine.options import EngineOptions
from fluxc.errors import OptionError
from fluxc.plan import Plan

MEMINFO = Path("/proc/meminfo")
CONTEXT = 32_768
"""Tokens a request is taken to have at most where the model does not say."""


def pool_pages(programs: Any, plan: Plan, options: EngineOptions) -> int:
    """Pages of the pool: `kv_memory`, or enough for `max_batch` whole contexts within half of what is free.

    Raises OptionError where that is not one page a layer, and for a kv_memory that is not free.
    """
    size, free = demand.page_bytes(programs.layers, programs.dtype), free_bytes(programs.device)
    if options.kv_memory is None:
        context = options.context_of(programs.context) or CONTEXT
        whole = demand.pages(programs.layers, plan, [True] * len(plan.layers), context)
        pages = min(free // 2 // size, options.max_batch * whole)
    elif options.kv_memory > free:
        raise OptionError(f"kv_memory of {options.kv_memory:,} bytes is more than the {free:,} bytes that are free")
    else:
        pages = options.kv_memory // size
    if pages < len(programs.layers):
        raise OptionError(
            f"{pages * size:,} bytes of KV memory are less than one page a layer",
            hint=f"kv_memory of at least {len(programs.layers) * size:,} bytes",
        )
    return pages


def free_bytes(device: Any) -> int:
    """Memory that can be had now, what the system only remembers files in included."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
