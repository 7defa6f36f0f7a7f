"""What a load showed: rates, percentiles, errors, and answers that differ from the ones given alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fluxc.bench.load_client import Seen

SHARES = (0.5, 0.9, 0.99)


def percentiles(values: Sequence[float | None]) -> dict[str, float] | None:
    """p50, p90, p99 and the mean of the values that are there."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    found = {f"p{share * 100:g}": known[math.ceil(share * len(known)) - 1] for share in SHARES}
    return {**found, "mean": sum(known) / len(known)}


def summary(seen: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """Counts, rates a second, and percentiles in seconds."""
    good = [one for one in seen if one.ask.kind == "good" and one.status == 200]
    ratios = [one.sparse_ratio for one in good if one.sparse_ratio is not None]
    return {
        "requests": len(seen),
        "seconds": seconds,
        "answered": len(good),
        "requests_per_second": len(good) / seconds,
        "tokens_per_second": sum(one.tokens for one in good) / seconds,
        "sparse_ratio": sum(ratios) / len(ratios) if ratios else None,
        "first_token": percentiles([one.first for one in good]),
        "per_token": percentiles([one.per_token for one in good]),
        "whole": percentiles([one.total for one in good]),
        "retries": sum(one.retries for one in seen),
        "statuses": {
            kind: dict(sorted(Counter(str(one.status) for one in seen if one.ask.kind == kind).items()))
            for kind in ("good", "cancel", "malformed")
        },
        "errors": dict(Counter(one.error for one in seen if one.ask.kind == "good" and one.error)),
    }


def faults(seen: Sequence[Seen], alone: Mapping[int, Seen]) -> dict[str, Any]:
    """What must not be: good requests without an answer or with another one, bad ones without a 4xx and a message."""
    good = [one for one in seen if one.ask.kind == "good"]
    other = [one for one in good if one.status == 200 and not _same(one, alone[one.ask.key])]
    bad = [one for one in seen if one.ask.kind == "malformed"]
    return {
        "good_unanswered": sum(one.status != 200 for one in good),
        "good_compared": len(good),
        "good_differing": [
            {"key": one.ask.key, "alone": alone[one.ask.key].text, "under_load": one.text, "body": one.ask.content}
            for one in other
        ],
        "malformed_not_4xx": [one.status for one in bad if not (400 <= one.status < 500 and one.error)],
    }


def _same(one: Seen, alone: Seen) -> bool:
    return (one.text, one.finish) == (alone.text, alone.finish)
