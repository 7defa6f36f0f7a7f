"""`python -m fluxc.bench.trt_build model.flux`: TensorRT engines of a model, built on this machine and read back.

Times are those of the whole export (translation to ONNX, both engines, comparison in ONNX Runtime). No engine is run.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import size, table


@command("trt_build", examples="python -m fluxc.bench.trt_build smollm2.flux -o trt-build-cpu.json")
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option("--max-length", type=int, help="Longest prompt with its answer.  [default: the model's context]")
@click.option("--verify/--no-verify", default=True, help="Compare in ONNX Runtime.  [default: verify]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write everything there, as JSON.")
def trt_build(screen: Screen, flux: Path, max_length: int | None, verify: bool, output: Path | None) -> None:
    """Build the TensorRT engines of MODEL.flux in a temporary folder, and say what was read of them."""
    from fluxc.exporters.export import export

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place, options = Path(folder, "engine"), {"max_length": max_length} if max_length else {}
        report = export(
            flux, target="trt", output=place, verify=verify, options=options, progress=screen.progress()
        ).report
        versions = json.loads((place / "engine.json").read_text())["versions"]
    result = _result(report, versions, time.perf_counter() - started)
    if output:
        _write(output, result)
    screen.show(_table(result["built"]), f"{result['seconds']:.0f} s in all, with {_verified(result['verified'])}")
    screen.result(result)


def _result(report: dict[str, Any], versions: dict[str, str], seconds: float) -> dict[str, Any]:
    """What is kept: nothing that names this machine's folders."""
    kept = {name: report[name] for name in ("attentions", "routable", "weight_bytes", "bytes", "verified", "built")}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    machine = {"cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    return {
        "seconds": round(seconds, 1),
        "exporter_peak_bytes": memory,
        "machine": machine,
        "versions": versions,
        **kept,
    }


def _table(built: dict[str, Any]) -> Any:
    head = ("engine", "build s", "peak memory", "size", "layers", "conditionals", "largest buffer", "bound")
    made = table(*head, numbers=head[1:])
    for name, one in built.items():
        made.add_row(
            name,
            f"{one['seconds']:.0f}",
            size(one["peak_bytes"]),
            size(one["bytes"]),
            str(one["network_layers"]),
            f"{one['conditionals']} of {one['routable']}",
            size(one["largest_buffer_bytes"]),
            size(one["attention_bound_bytes"]),
        )
    return made


def _verified(found: dict[str, Any]) -> str:
    if not found:
        return "no comparison"
    return f"a comparison at {', '.join(map(str, found['lengths']))} tokens: within {found['prefill']:.1e}"


def _write(path: Path, result: dict[str, Any]) -> None:
    from fluxc.atomic import atomic_file

    with atomic_file(path, force=True) as temporary:
        temporary.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_frame(command=trt_build, name="python -m fluxc.bench.trt_build"))
