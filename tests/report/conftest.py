"""A toy model.flux with stored results, made in a moment: what a report is drawn from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

SYSTEMS = ("dense", "every second layer", "all sparse", "fluxc 0.4", "fluxc 0.2", "best static 0.4", "random 0.4")
TASKS = {"retrieval": ("needle", "kv"), "text": ("prose", "code"), "local": ("local",)}


def evaluation() -> dict[str, Any]:
    """A result of two layers, drawn from a seed: the form of `fluxc eval`, numbers of nobody."""
    from fluxc.evaluate.summary import summaries

    drawn = random.Random(0)
    rows = []
    for suite, tasks in TASKS.items():
        for prompt in range(8):
            for system in SYSTEMS:
                routes = {"dense": "11", "all sparse": "00"}.get(system, drawn.choice(("10", "01", "11")))
                exact = None if suite == "text" else drawn.random() < (0.1 if system == "all sparse" else 0.8)
                budget = float(system.split()[-1]) if "0." in system else None
                row = {"suite": suite, "task": tasks[prompt % len(tasks)], "prompt": prompt, "length": 100}
                loss = drawn.uniform(1.0, 1.1) + (system == "all sparse")
                rows.append({**row, "tokens": 99, "system": system, "budget": budget, "loss": loss, "exact": exact})
                rows[-1]["routes"] = routes
    suites = {s: {"tasks": list(t), "lengths": [100], "prompts": 8, "rule": f"rule of {s}"} for s, t in TASKS.items()}
    options = {"suites": list(TASKS), "count": 8, "lengths": [], "seed": 1000, "oracle": ""}
    conditions = {"model": "toy", "device": "CPU", "budgets": [0.2, 0.4], "options": options, "corpus": "0" * 64}
    conditions |= {"versions": {"torch": "2.13.0"}, "sink": 4, "window": 12, "decode": "sparse"}
    summary = summaries(rows, 32)
    return {"format": 1, "conditions": conditions, "suites": suites, "rows": rows, "summary": summary}


def bench() -> dict[str, Any]:
    """Prefill times at two lengths."""
    lengths = []
    for length, dense in ((1024, 1.0), (4096, 8.0)):
        runs = [
            {"name": name, "sparse_ratio": 0.5, "speedup": speed, "bound": 1.6, "ideal": 1.4}
            for name, speed in (("forced", 1.2), ("chosen", 1.1))
        ]
        lengths.append({"length": length, "dense": {"median": dense}, "routed": runs})
    return {"conditions": {"device": "CPU"}, "crossover": 1100, "lengths": lengths}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy.flux` with both results and the needs of a calibration beside it and in it."""
    from fluxc.artifact import update_flux
    from fluxc.toy_flux import toy_flux

    base = tmp_path_factory.mktemp("report")
    flux = toy_flux(base / "toy.flux")
    needs = {"needs": [[0.5, 0.01], [0.3, -0.02]], "tasks": ["needle", "prose"], "options": {"sparse_kind": "auto"}}
    update_flux(flux.path, measurements={"calibration.json": json.dumps(needs)})
    (base / "toy.eval.json").write_text(json.dumps(evaluation()))
    (base / "toy.bench.json").write_text(json.dumps(bench()))
    return flux.path
