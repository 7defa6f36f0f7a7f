"""How large the pool of pages is."""

from __future__ import annotations

import os

import torch

from fluxc.engine import demand
from fluxc.engine.options import EngineOptions
from fluxc.engine.programs import Programs
from fluxc.errors import OptionError
from fluxc.plan import Plan

CONTEXT = 32_768
"""Tokens a request is taken to have at most where the model does not say."""


def pool_pages(programs: Programs, plan: Plan, options: EngineOptions) -> int:
    """Pages of the pool: `kv_memory`, or enough for `max_batch` whole contexts within half of what is free.

    Raises OptionError where that is not one page a layer.
    """
    size = demand.page_bytes(programs.layers, programs.dtype)
    wanted = demand.pages(programs.layers, plan, [True] * len(plan.layers), programs.context or CONTEXT)
    fits = free_bytes(programs.device) // 2 // size if options.kv_memory is None else options.kv_memory // size
    pages = min(fits, options.max_batch * wanted) if options.kv_memory is None else fits
    if pages < len(programs.layers):
        raise OptionError(
            f"{pages * size:,} bytes of KV memory are less than one page a layer",
            hint=f"kv_memory of at least {len(programs.layers) * size:,} bytes",
        )
    return pages


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
