"""How likely the chosen token was, and which others were."""

from __future__ import annotations

from typing import Any

import numpy as np

Likelihood = tuple[float, tuple[tuple[int, float], ...]]
"""Log-probability of the chosen token; the most likely tokens with theirs, falling."""


def likelihood(logits: Any, token: int, count: int) -> Likelihood:
    """Of `token` by logits [V] (a tensor or an array), and of the `count` most likely ones."""
    scores = np.asarray(_on_host(logits), np.float64)
    highest = scores.max()
    logs = scores - highest - np.log(np.exp(scores - highest).sum())
    top = _largest(logs, min(count, len(logs)))
    return float(logs[token]), tuple((int(at), float(logs[at])) for at in top)


def _on_host(logits: Any) -> Any:
    return logits.float().cpu() if hasattr(logits, "cpu") else logits


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest, falling; the first of equal ones comes first."""
    if not count:
        return np.zeros(0, np.int64)
    found = np.argpartition(-values, count - 1)[:count]
    order: np.ndarray = found[np.lexsort((found, -values[found]))]
    return order
