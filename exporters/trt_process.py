"""Runs the TensorRT builder in a process with a time limit, and says in one line what went wrong there."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fluxc.errors import InternalError, StorageError, TargetError
from fluxc.exporters.trt_builder import Job, installed

_TAIL = 3
_LONGEST_LINE = 300
_NO_SPACE = "No space left on device"


def parse(onnx: Path, seconds: float) -> dict[str, Any]:
    """What TensorRT's parser finds; raises TargetError naming the operation it does not take."""
    return _run(onnx, "", {}, seconds, "")


def build(
    onnx: Path, engine: Path, shapes: dict[str, list[list[int]]], seconds: float, inspect: Path
) -> dict[str, Any]:
    """Build `engine`; returns its figures (trt_builder.run).

    Raises TargetError for an operation TensorRT does not take and for a build of more than `seconds`; StorageError for
    a full disk; InternalError with the builder's last lines where it crashed.
    """
    return _run(onnx, str(engine), shapes, seconds, str(inspect))


def _run(onnx: Path, engine: str, shapes: dict[str, list[list[int]]], seconds: float, inspect: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(str(onnx), engine, shapes, str(Path(folder, "result.json")), installed(), inspect)
        file = Path(folder, "job.json")
        file.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        done = _process(file, onnx.name, seconds)
        result = Path(job.result)
        if done.returncode or not result.is_file():
            raise _crash(onnx.name, done.returncode, done.stdout)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if found["errors"]:
        raise _refused(onnx.name, found["errors"][0])
    return found


def _process(job: Path, name: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fluxc.exporters.trt_builder", str(job)]
    try:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as cause:
        raise TargetError(
            f"TensorRT took more than {seconds:g} s to build {name}", hint="give it more with --time-limit"
        ) from cause


def _refused(name: str, error: dict[str, str]) -> TargetError:
    what = error["operator"] or "the model"
    node = f" (node {error['node']})" if error["node"] else ""
    return TargetError(
        f"TensorRT cannot express {what}{node} of {name}: {_one_line(error['reason'])}",
        hint="use --target onnx for this model",
    )


def _crash(name: str, code: int, log: str) -> InternalError | StorageError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any(_NO_SPACE in line for line in lines[-_TAIL:]):
        return StorageError(
            f"cannot write the engine of {name}: {_NO_SPACE}", hint="free some space or write elsewhere"
        )
    how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
    last = "; ".join(_one_line(line) for line in lines[-_TAIL:]) or "it said nothing"
    return InternalError(f"the TensorRT builder stopped at {name} ({how}). Its last lines: {last}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST_LINE]
