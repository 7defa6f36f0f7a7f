"""What is measured: shapes, sparsity, and how many query-key pairs each needs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of one model: `heads` query heads on `kv_heads` key heads of `width`."""

    heads: int = 32
    kv_heads: int = 8
    width: int = 128

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} x {self.width}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one size. window 0: full attention; last: dense rows at the end (triangle)."""

    op: str
    length: int
    shape: Shape = Shape()
    sink: int = 0
    window: int = 0
    last: int = 0

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of causal attention, per head."""
        return self.length * (self.length + 1) // 2

    @property
    def pairs(self) -> int:
        """Query-key pairs this case must compute, per head."""
        if not self.window:
            return self.dense_pairs
        reach = min(self.sink + self.window, self.length)
        sparse_rows = self.length - self.last
        total = _triangle(min(reach, sparse_rows)) + max(0, sparse_rows - reach) * reach
        return total + self.dense_pairs - _triangle(sparse_rows)

    @property
    def density(self) -> float:
        """Share of the causal pairs."""
        return self.pairs / self.dense_pairs

    @property
    def flops(self) -> int:
        """Floating-point operations of both matrix products."""
        return 4 * self.pairs * self.shape.heads * self.shape.width

    def dense(self) -> Case:
        """Full attention of the same size: the yardstick of the ideal."""
        return Case("attention", self.length, self.shape)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


SMOLLM2 = Shape(9, 3, 64)
QWEN = Shape(28, 4, 128)
WIDE = Shape(16, 8, 256)
LARGE = Shape(64, 8, 128)
NO_GROUPS = Shape(16, 16, 64)
PREFILL = (
    *(Case("attention", length) for length in (8192, 32768, 131072)),
    *(Case("streaming_attention", length, sink=128, window=2048) for length in (32768, 131072, 262144)),
    *(Case("triangle_attention", length, sink=128, window=2048, last=128) for length in (32768, 131072)),
    *(Case("attention", 32768, shape) for shape in (SMOLLM2, QWEN, LARGE, NO_GROUPS, WIDE)),
    *(Case("streaming_attention", 32768, shape, sink=128, window=2048) for shape in (SMOLLM2, QWEN, LARGE, NO_GROUPS)),
)
