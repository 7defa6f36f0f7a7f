"""An AOTI engine as parity checks call it: one request, one cache a layer, copied into pages for each step."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fluxc.exporters.aoti_programs import OpenedPrograms
from fluxc.kernels.schemas import PAGE


@dataclasses.dataclass(frozen=True)
class AotiPhases:
    """`parity.Phases` over the programs of an engine."""

    opened: OpenedPrograms

    def prefill(self, input_ids: Tensor, route_bias: Tensor, logits_at: Tensor) -> dict[str, Tensor]:
        """See `parity.Phases.prefill`."""
        length = torch.tensor([input_ids.shape[1]])
        inputs = {
            "input_ids": input_ids,
            "position_ids": torch.arange(input_ids.shape[1])[None],
            "seq_lens": length,
            "prompt_lens": length,
            "route_bias": route_bias,
            "logits_at": logits_at,
        }
        return self.opened.prefill(inputs)

    def decode(
        self, caches: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor, slots: Tensor, lens: Tensor
    ) -> Tensor:
        """See `parity.Phases.decode`."""
        count = len(slots)
        room = max(caches[f"k_cache_{index}"].shape[2] for index in range(count))
        pages = -(-room // PAGE)
        table = torch.arange(count * pages, dtype=torch.int32).view(count, 1, pages)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "cache": _paged(caches, count, pages)}
        inputs |= {"slots": slots + torch.arange(count)[:, None] * pages * PAGE, "page_table": table, "lens": lens}
        logits = self.opened.decode(inputs)["logits"]
        for name, cache in caches.items():
            half, index = "kv".index(name[0]), int(name.rpartition("_")[2])
            own = inputs["cache"][index * pages : (index + 1) * pages, half].transpose(0, 1).flatten(1, 2)
            cache[0] = own[:, : cache.shape[2]]
        return logits

    def close(self, phase: str) -> None:
        """Nothing: all programs of the engine read one mapping of its weights."""


def _paged(caches: dict[str, Tensor], count: int, pages: int) -> Tensor:
    """Caches k_cache_a, v_cache_a [1,Hk,C,D] as pages [count*pages,2,Hk,PAGE,D]; what no token wrote is NaN."""
    first = caches["k_cache_0"]
    made = first.new_full((count * pages, 2, first.shape[1], PAGE, first.shape[3]), torch.nan)
    for name, cache in caches.items():
        half, index = "kv".index(name[0]), int(name.rpartition("_")[2])
        rows = torch.nn.functional.pad(cache[0], (0, 0, 0, pages * PAGE - cache.shape[2]), value=torch.nan)
        made[index * pages : (index + 1) * pages, half] = rows.unflatten(1, (pages, PAGE)).transpose(0, 1)
    return made
