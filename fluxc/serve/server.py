"""Runs the app with uvicorn until SIGTERM or Ctrl-C, and lets running answers end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from fluxc.errors import OptionError
from fluxc.serve.app import create_app
from fluxc.serve.logs import log
from fluxc.serve.options import ServeOptions

if TYPE_CHECKING:
    from fluxc.engine.engine import Engine

_GRACE = 5
"""Seconds past the drain limit for the ends of cancelled answers to be written."""
_BACKLOG = 2048
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def open_socket(host: str, port: int) -> socket.socket:
    """A bound socket; raises OptionError where the port is in use or the host is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as cause:
        made.close()
        if cause.errno == errno.EADDRINUSE:
            raise OptionError(
                f"port {port} is in use", hint="choose another with --port, 0 for any free one"
            ) from cause
        raise OptionError(f"cannot listen on {host}:{port}: {cause.strerror}", hint="choose another --host") from cause
    return made


def serve(engine: Engine, settings: ServeOptions, listening: socket.socket) -> None:
    """Answer requests until a signal comes; returns when all is drained and the engine is closed."""
    DrainingServer(engine, settings).run(sockets=[listening])


class DrainingServer(uvicorn.Server):
    """A uvicorn server that takes no more requests after a signal, and ends what still runs `drain_seconds` later."""

    def __init__(self, engine: Engine, settings: ServeOptions) -> None:
        app = create_app(engine, settings)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=int(settings.drain_seconds) + _GRACE,
            )
        )
        self._service, self._seconds = app.state.service, settings.drain_seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn would raise the signal once more at the end; a server that drained has ended well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._drain, loop, number.name)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _drain(self, loop: asyncio.AbstractEventLoop, signal_name: str) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        log("draining", signal=signal_name, seconds=self._seconds)
        self._service.drain()
        loop.call_later(self._seconds, self._service.abort)
        self.should_exit = True
