"""The one look of all tables, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


_UNITS = ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"))


def table(*columns: str, numbers: Iterable[str] = ()) -> Table:
    """An empty table; the columns named in `numbers` are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD)
    for column in columns:
        made.add_column(column, justify="right" if column in set(numbers) else "left")
    return made


def size(count: int) -> str:
    """Bytes for people: 1.5 MB."""
    scale, unit = next((s for s in _UNITS if count < 1000 * s[0]), _UNITS[-1])
    return f"{count} B" if scale == 1 else f"{count / scale:.1f} {unit}"
