"""Rows of a long measurement under a deadline: each is written when it is there, and a failed one says why."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fluxc.atomic import atomic_file

Row = dict[str, Any]


class Rows:
    """The rows measured so far and the time that is left. `output`: the JSON file, written anew after each row.

    `deadline`: seconds from now after which no row begins; 0 for none. Rows that take long ask `left` themselves.
    """

    def __init__(self, conditions: Row, output: Path | None, deadline: float, device: str) -> None:
        self.found: Row = {"conditions": conditions, "rows": []}
        self._output, self._device = output, device
        self._begin = time.perf_counter()
        self._deadline = deadline

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - self.elapsed() if self._deadline else float("inf")

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begin

    def take(self, section: str, name: str, measure: Callable[[], Row], needs: float = 0.0) -> Row:
        """Measure a row: what `measure` returns, or the error it raised; skipped where fewer seconds are left than it
        `needs` at least."""
        begin = self.elapsed()
        row: Row = {"section": section, "name": name}
        if self.left() < needs or self.left() <= 0:
            row["error"] = f"not begun: {self.left():.0f} s were left"
        else:
            # A row that fails for whatever reason must not take the rows after it with it.
            try:
                row |= measure()
            except Exception as fault:
                row |= {"error": f"{type(fault).__name__}: {fault}"[:600], "trace": _where(fault)}
                del fault
        row |= {"at": begin, "took": self.elapsed() - begin, "clocks": clocks(self._device)}
        self.found["rows"].append(row)
        self.write()
        with contextlib.suppress(RuntimeError):  # a device that failed for good says so in every row
            free(self._device)
        return row

    def write(self) -> None:
        """The JSON file as of now."""
        if self._output:
            with atomic_file(self._output, force=True) as temporary:
                temporary.write_text(json.dumps(self.found, indent=1))


def _where(fault: Exception) -> list[str]:
    return traceback.format_exception(fault)[-6:]


def clocks(device: str) -> str:
    """What nvidia-smi reads now of clocks, power and temperature; nothing on the CPU."""
    if device == "cpu":
        return ""
    from fluxc.kernels.bench import measure

    return measure.clocks()


def free(device: str) -> None:
    """Give memory that nobody holds back to the device: rows need it in pieces of other sizes."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def rounds(
    names: Sequence[str],
    run: Callable[[str], Any],
    *,
    repeats: int,
    left: Callable[[], float],
    most_seconds: float = float("inf"),
    warm: Sequence[str] = (),
) -> dict[str, list[Any]]:
    """What `run` returns for each name, in up to `repeats` rounds after a warm-up of `warm`.

    Each round starts one name later than the one before, so that drifting clocks hit all alike. Before a run, and a
    round, that would go on beyond `left` seconds, or a round beyond `most_seconds` in all, it ends; names that were not
    reached are missing.
    """
    taken: dict[str, list[Any]] = {}
    last: dict[str, float] = {}
    begin = time.perf_counter()
    for name in warm:
        run(name)
    for turn in range(repeats):
        whole = sum(last.values())
        if turn and (time.perf_counter() - begin + whole > most_seconds or whole > left()):
            break
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            # A run that was never seen is taken to last as long as the longest that was.
            if left() <= last.get(name, max(last.values(), default=0.0)):
                return taken
            start = time.perf_counter()
            taken.setdefault(name, []).append(run(name))
            last[name] = time.perf_counter() - start
    return taken
