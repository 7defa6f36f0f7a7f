"""`python -m fluxc.bench.onnx model.flux`: what the ONNX target costs and gives, against the limits it has to keep.

Every part runs in a process of its own, one after another. Times are wall-clock; CPU seconds stand beside them, because
they move less where other work shares the machine. Nothing is timed where results differ.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table
from fluxc.errors import InternalError

LAYERS = (2, 8, 30)
FIRST_TOKEN_ROUNDS = 3
_SHOWN = 2000
Result = dict[str, Any]


@command(
    "onnx",
    examples="""
    python -m fluxc.bench.onnx smollm2.flux -o bench/results/onnx-cpu.json
    python -m fluxc.bench.onnx smollm2.flux --length 2048 --layers 2 --rounds 1
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path, exists=True))
@click.option("--dense-of", default="smollm2", show_default=True, help="The transformers model to export densely.")
@click.option("--length", default=8192, show_default=True, type=click.IntRange(min=64), help="Tokens of the prefill.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Timed prefills of each kind.")
@click.option("--threads", default=0, type=click.IntRange(min=0), help="Of one operator.  [default: all cores]")
@click.option("--layers", "counts", multiple=True, type=click.IntRange(min=1), help=f"Of the table. Default: {LAYERS}.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    help="Folder of the models; takes a dense.onnx there.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Raw JSON, rewritten after each part.")
def onnx(
    screen: Screen,
    flux: Path,
    dense_of: str,
    length: int,
    rounds: int,
    threads: int,
    counts: tuple[int, ...],
    work: Path | None,
    output: Path | None,
) -> None:
    """Export MODEL.flux to ONNX and measure the export and the engine."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = _Parts(folder, screen, output, {"conditions": _conditions(flux, threads)})
        engine, plain = str(folder / "engine"), str(folder / "dense.onnx")
        parts.add("export", "export", model=str(flux), place=engine, verify=True)
        parts.add("text", "text", model=str(flux), engine=engine, tokens=32)
        parts.add("memory", "memory", engine=engine)
        parts.add_first_tokens(engine)
        if not Path(plain).exists():
            parts.add("dense_export", "dense", model=dense_of, place=plain)
        parts.add("prefill", "prefill", engine=engine, dense=plain, length=length, rounds=rounds, threads=threads)
        parts.add_growth(counts or LAYERS)
    screen.show(_table(parts.found))
    screen.result(parts.found)


class _Parts:
    """Runs parts and keeps what they found."""

    def __init__(self, folder: Path, screen: Screen, output: Path | None, found: Result) -> None:
        self.folder, self.found = folder, found
        self._screen, self._output = screen, output

    def add(self, name: str, step: str, **arguments: Any) -> Result:
        """Run one step and keep its result under `name`."""
        self._screen.progress().start(name)
        return self._keep(name, _run(step, **arguments))

    def add_first_tokens(self, engine: str) -> None:
        """Seconds from the start of a process to its first token, several times."""
        seconds = []
        for _ in range(FIRST_TOKEN_ROUNDS):
            began = time.perf_counter()
            found = self.add("first_token", "first_token", engine=engine, length=10)
            seconds.append(round(time.perf_counter() - began, 2))
        self._keep("first_token", {**found, "tokens": 10, "seconds": seconds, "median": statistics.median(seconds)})

    def add_growth(self, counts: tuple[int, ...]) -> None:
        """Exports of models that differ in their number of layers."""
        rows = []
        for count in counts:
            model, place = str(self.folder / f"layers-{count}.flux"), str(self.folder / f"layers-{count}")
            self.add("growth", "random_model", layers=count, place=model)
            rows.append({"layers": count, **self.add("growth", "export", model=model, place=place, verify=False)})
        self._keep("growth", {"rows": rows})

    def _keep(self, name: str, result: Result) -> Result:
        self.found[name] = result
        if self._output:
            self._output.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        return result


def _run(step: str, **arguments: Any) -> Result:
    command = [sys.executable, "-P", "-m", "fluxc.bench.onnx_steps", step, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InternalError(f"part {step} of the benchmark failed: {done.stderr.strip()[-_SHOWN:]}")
    found: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _conditions(flux: Path, threads: int) -> Result:
    import importlib.metadata

    from fluxc.exporters.targets import TARGETS
    from fluxc.plan import Plan

    plan = Plan.load(flux / "plan.json")
    names = ("torch", *(name for (name,) in TARGETS["onnx"].libraries))
    first = plan.layers[0]
    return {
        "model": plan.model.family,
        "plan": plan.digest(),
        "kind": f"{first.kind} {first.sink}+{first.window}",
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _table(found: Result) -> Any:
    """Each limit beside what was found."""
    made = table("what", "found", "limit", numbers=("found", "limit"))
    export, memory, prefill, rows = found["export"], found["memory"], found["prefill"], found["growth"]["rows"]
    weights = export["weight_bytes"]
    lines = [
        ("export, s", sum(export["seconds"].values()), "240"),
        ("export without verification, s", export["seconds"]["exporting"] + export["seconds"]["writing"], ""),
        ("engine on disk / weights", export["engine_bytes"] / weights, "1.15"),
        ("loaded in memory / weights", (memory["after_bytes"] - memory["before_bytes"]) / weights, "1.15"),
        ("answers equal to model.flux", f"{found['text']['equal']} of {found['text']['answers']}", "all"),
        ("first token, s", found["first_token"]["median"], "6"),
        ("all-full over all-sparse, CPU s", prefill["full_over_sparse"], "1.4"),
        ("dense over all-full, CPU s", prefill["dense_over_full"], "1"),
    ]
    for row in rows:
        lines.append((f"{row['layers']} layers: export, CPU s", row["cpu_seconds"], ""))
        lines.append((f"{row['layers']} layers: peak / weights", row["peak_bytes"] / row["weight_bytes"], "2.5"))
    for name, value, limit in lines:
        made.add_row(name, value if isinstance(value, str) else f"{value:.2f}", limit)
    return made


if __name__ == "__main__":
    sys.exit(run_frame(command=onnx, name="python -m fluxc.bench.onnx"))
