"""An engine of the exact toy programs behind the app: in process, and on a port for real clients."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="serving is an extra: pip install 'fluxc[serve]'")

CONTEXT = 200


@pytest.fixture(scope="session")
def tokenizer():
    from fluxc.testing import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture(scope="session")
def make_engine(tokenizer):
    """Engines of three layers, sink 2 and window 6; slow ones take `seconds` more for each token."""
    from fluxc.engine.engine import Engine
    from fluxc.engine.options import EngineOptions
    from fluxc.tiny_tokenizer import VOCAB
    from fluxc.toy_engine import ToyPrograms, toy_plan

    class Served(ToyPrograms):
        vocabulary = VOCAB
        seconds = 0.0

        def decode(self, *inputs):
            time.sleep(self.seconds)
            return super().decode(*inputs)

    def make(seconds: float = 0.0, **options):
        plan = toy_plan([(2, 6), 4, (2, 6)], context=CONTEXT)
        programs = Served(plan)
        programs.seconds = seconds
        settings = EngineOptions(**{"max_batch": 4, **options})
        return Engine(programs, plan, tokenizer=tokenizer, eos_ids=[1], options=settings)

    return make


@pytest.fixture(scope="session")
def serving(make_engine):
    """Runs a server on a free port while its `with` block does: (base url, service, server)."""
    from fluxc.serve.options import ServeOptions
    from fluxc.serve.server import DrainingServer, open_socket

    @contextlib.contextmanager
    def run(seconds: float = 0.0, **options):
        options = {"engine": "toy", "max_batch": 4, "max_queue": 64, **options}
        server = DrainingServer(make_engine(seconds, max_batch=options["max_batch"]), ServeOptions(**options))
        with open_socket("127.0.0.1", 0) as listening:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            try:
                while not server.started:
                    time.sleep(0.01)
                yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
            finally:
                server.should_exit = True
                thread.join()

    return run


@pytest.fixture
def client(make_engine):
    """`client(**options)`: starlette's test client of an app; all are closed at the end."""
    from starlette.testclient import TestClient

    from fluxc.serve.app import create_app
    from fluxc.serve.options import ServeOptions

    with contextlib.ExitStack() as stack:

        def make(seconds: float = 0.0, **options):
            settings = ServeOptions(**{"engine": "toy", "max_batch": 4, "max_queue": 64, **options})
            made = TestClient(create_app(make_engine(seconds), settings), raise_server_exceptions=False)
            return stack.enter_context(made)

        yield make
