"""`python -m fluxc.bench.trt_gpu engine-trt/`: prefill of a TensorRT engine, all layers full against all sparse.

Not run here: its authors had no GPU that TensorRT-RTX supports. Before it times anything it compares the logits of both
routes at every length with ONNX Runtime's, over the ONNX files that the engine was built from (`--keep-onnx`).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table

LENGTHS = (1024, 2048, 4096, 8192)
TOLERANCE = 5e-3
"""Largest relative difference of a logit: the GPU multiplies in TF32."""


@command("trt_gpu", examples="python -m fluxc.bench.trt_gpu engine-trt/ -o trt-gpu.json")
@click.argument("engine", metavar="ENGINE", type=click.Path(path_type=Path))
@click.option("--length", "lengths", multiple=True, type=click.IntRange(min=1), help=f"Default: {LENGTHS}.")
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write everything there, as JSON.")
def trt_gpu(
    screen: Screen, engine: Path, lengths: tuple[int, ...], repeats: int, device: str, output: Path | None
) -> None:
    """Time prefill of ENGINE with all routable layers full, and with all sparse."""
    from fluxc.errors import SourceError
    from fluxc.exporters.engine_dir import open_engine
    from fluxc.exporters.trt_programs import TrtPrograms

    opened = open_engine(engine, "trt")
    if not (engine / "prefill.onnx").is_file():
        raise SourceError(f"{engine} has no ONNX file to compare with", hint="export it with --keep-onnx")
    programs = TrtPrograms(opened, device)
    longest = opened.manifest.programs["prefill"]["profile"]["input_ids"][2][1]
    chosen = [length for length in lengths or LENGTHS if length <= longest]
    progress = screen.progress()
    progress.start("prefill", len(chosen))
    found = []
    for length in chosen:
        found.append(measure(programs, reference(engine), len(opened.plan.layers), length, repeats))
        progress.advance()
    if output:
        output.write_text(json.dumps(found, indent=1))
    screen.show(_table(found))
    screen.result({"lengths": found})


def reference(engine: Path) -> Any:
    """ONNX Runtime over the file the engine was built from."""
    from fluxc.exporters.onnx_sessions import OnnxSessions

    return OnnxSessions(engine, {"prefill": "prefill.onnx", "decode": "decode.onnx"})


def measure(programs: Any, expected: Any, layers: int, length: int, repeats: int) -> dict[str, Any]:
    """Seconds of one prompt of `length` random tokens; raises SelfCheckError where the logits are wrong."""
    import numpy as np

    ids = np.random.default_rng(length).integers(0, programs.vocabulary, (1, length))
    rest = np.array([length]), np.array([[length - 1]])
    times: dict[str, list[float]] = {"full": [], "sparse": []}
    for number in range(repeats + 1):
        for name, value in (("full", math.inf), ("sparse", -math.inf)):
            bias = np.full((layers, 1), value, np.float32)
            started = time.perf_counter()
            logits = programs.sessions.prefill(ids, rest[0], bias, rest[1])["logits"]
            times[name].append(time.perf_counter() - started)
            if not number:  # the warm-up is the one that is compared
                _compare(logits, expected.prefill(ids, rest[0], bias, rest[1])["logits"], f"{length} tokens, {name}")
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {"length": length, "seconds": medians, "speedup": medians["full"] / medians["sparse"], "repeats": repeats}


def _compare(found: Any, expected: Any, where: str) -> None:
    from fluxc.errors import SelfCheckError

    error = float(abs(found - expected).max()) / max(1.0, float(abs(expected).max()))
    if not error <= TOLERANCE:
        raise SelfCheckError(f"{where}: the engine's logits differ from ONNX Runtime's by {error:.1e}")


def _table(found: list[dict[str, Any]]) -> Any:
    made = table("tokens", "full s", "sparse s", "speed-up", numbers=("tokens", "full s", "sparse s", "speed-up"))
    for one in found:
        seconds = one["seconds"]
        made.add_row(str(one["length"]), f"{seconds['full']:.4f}", f"{seconds['sparse']:.4f}", f"{one['speedup']:.2f}")
    return made


if __name__ == "__main__":
    sys.exit(run_frame(command=trt_gpu, name="python -m fluxc.bench.trt_gpu"))
