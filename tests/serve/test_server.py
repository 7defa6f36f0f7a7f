"""A server that shuts down lets running answers end, for as long as it may."""

from __future__ import annotations

import json
import threading
import time

import httpx
import pytest

from fluxc.errors import OptionError
from fluxc.serve.options import ServeOptions
from fluxc.serve.server import open_socket

BODY = {"model": "toy", "prompt": "The key", "max_tokens": 20, "stream": True, "ignore_eos": True, "temperature": 0}


def lines(url: str, found: list[str], begun: threading.Event, **changes) -> None:
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, **changes}, timeout=30) as response:
        for line in response.iter_lines():
            begun.set()
            if line:
                found.append(line.removeprefix("data: "))


def ask_and_drain(serving, drain_seconds: float, **changes):
    """Shuts a server down while an answer of 20 slow tokens runs: the lines it sent, and seconds until it was gone."""
    found, begun = [], threading.Event()
    with serving(seconds=0.05, drain_seconds=drain_seconds) as (url, server):
        asking = threading.Thread(target=lines, args=(url, found, begun), kwargs=changes)
        asking.start()
        assert begun.wait(10)
        start = time.monotonic()
        server._drain(_Timers(), "SIGTERM")
        assert server._service.gate.draining
    asking.join()
    return found, time.monotonic() - start


class _Timers:
    """What `_drain` needs of an event loop, from another thread."""

    def call_later(self, seconds, call):
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()


def test_running_answers_end_before_the_server_does(serving):
    found, seconds = ask_and_drain(serving, drain_seconds=20)
    assert found[-1] == "[DONE]" and seconds < 10
    assert json.loads(found[-2])["choices"][0]["finish_reason"] == "length"


def test_what_takes_too_long_is_ended_and_told_so(serving):
    found, seconds = ask_and_drain(serving, drain_seconds=0.3, max_tokens=180)
    assert json.loads(found[-1])["error"]["code"] == "shutting_down"
    assert seconds < 8


def test_a_port_in_use_is_named():
    with open_socket("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OptionError, match="is in use"):
            open_socket("127.0.0.1", first.getsockname()[1])
    with pytest.raises(OptionError, match="cannot listen on 203"):
        open_socket("203.0.113.1", 0)


def test_options_come_from_a_file_and_from_the_command_line(tmp_path):
    path = tmp_path / "serve.toml"
    path.write_text('engine = "engine"\nport = 9000\nmax_batch = 3\n[ray]\nreplicas = 4\n')
    found = ServeOptions.read(path, port=9001, host=None)
    assert (found.port, found.max_batch, found.ray.replicas) == (9001, 3, 4)
    assert found.engine == str(tmp_path / "engine") and found.model == "engine"
    for text, reason in (
        ("nonsense = 1", "nonsense"),
        ("[ray]\nmany = 1", "many"),
        ("port = 70000", "70000"),
        ("= 1", "TOML"),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match=reason):
            ServeOptions.read(path)
    with pytest.raises(OptionError, match="cannot be read"):
        ServeOptions.read(tmp_path / "missing.toml")
