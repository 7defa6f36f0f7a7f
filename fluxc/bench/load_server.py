"""The server under load: started as users start it, watched through its own metrics, ended by SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from fluxc.errors import TargetError

START_SECONDS = 300.0
WATCHED = (
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_cpu_seconds_total",
    "fluxc_running",
    "fluxc_queue",
    "fluxc_kv_used_bytes",
    "fluxc_kv_kept_bytes",
    "fluxc_tasks",
)


class Server:
    """`fluxc serve` of an engine in a process of its own, on a free port; its log goes to `log`."""

    def __init__(self, engine: Path, log: Path, options: Sequence[str] = ()) -> None:
        self.url = f"http://127.0.0.1:{_free_port()}"
        port = self.url.rpartition(":")[2]
        command = [sys.executable, "-P", "-m", "fluxc", "serve", str(engine), "--port", port, "--name", "model"]
        self._log = log.open("wb")
        self._process = subprocess.Popen([*command, *options], stderr=self._log, stdout=self._log, env={**os.environ})
        self.started = time.perf_counter()

    def first_answer(self) -> float:
        """Seconds from the start of the process to its first whole answer; raises TargetError where none comes."""
        body = {"model": "model", "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        while time.perf_counter() - self.started < START_SECONDS and self._process.poll() is None:
            try:
                if httpx.post(f"{self.url}/v1/completions", json=body, timeout=START_SECONDS).status_code == 200:
                    return time.perf_counter() - self.started
            except httpx.ConnectError:
                time.sleep(0.02)
        raise TargetError("the server did not answer", hint=f"its log is {self._log.name}")

    def watch(self) -> dict[str, float]:
        """The gauges that must not grow."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(values[name]) for name in WATCHED}

    def settled(self, seconds: float = 30.0) -> dict[str, float]:
        """The gauges once nothing runs any more, or after so many seconds."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            found = self.watch()
            if not (found["fluxc_running"] or found["fluxc_queue"] or found["fluxc_kv_used_bytes"]):
                return found
            time.sleep(0.2)
        return self.watch()

    def terminate(self) -> None:
        """SIGTERM."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> dict[str, Any]:
        """Exit code, and seconds until the process was gone."""
        start = time.perf_counter()
        code = self._process.wait(START_SECONDS)
        self._log.close()
        return {"exit_code": code, "seconds": time.perf_counter() - start}

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
