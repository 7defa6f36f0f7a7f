"""The thread that owns a scheduler. It runs while there is work and ends with it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from fluxc.engine.scheduler import Scheduler

Command = Callable[[], None]


class Worker:
    """Runs commands and steps of `scheduler` in one thread of its own, so that callers need no lock."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._inbox: collections.deque[Command] = collections.deque()
        # Reentrant: the garbage collector may run a finalizer that puts a command, wherever this thread is.
        self._gate = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopped: BaseException | None = None

    def put(self, command: Command) -> None:
        """Run `command` before the next step; raises the reason where the worker was stopped."""
        with self._gate:
            if self._stopped is not None:
                raise self._stopped
            self._inbox.append(command)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fluxc-engine", daemon=True)
                self._thread.start()

    def call(self, command: Command) -> None:
        """Run `command` before the next step, and wait until it ran. A stopped worker has nothing left to change."""
        if self._stopped is not None:
            return
        ran = threading.Event()

        def both() -> None:
            try:
                command()
            finally:
                ran.set()

        self.put(both)
        while self._stopped is None and not ran.wait(1.0):
            pass

    def stop(self, reason: BaseException) -> None:
        """End the thread after its step; what still waits or runs fails with `reason`."""
        with self._gate:
            self._stopped, thread = reason, self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._drain()
        self._scheduler.fail_all(reason)

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _run(self) -> None:
        while True:
            busy = self._step()
            with self._gate:
                if self._stopped is not None or not (busy or self._inbox):
                    self._thread = None
                    return

    def _step(self) -> bool:
        try:
            self._drain()
            return self._scheduler.step()
        except Exception as fault:
            self._scheduler.fail_all(fault)
            return self._scheduler.busy
