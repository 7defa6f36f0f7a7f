"""`fluxc serve` as a process: from its start to SIGTERM, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi", reason="serving is an extra: pip install 'fluxc[serve]'")

import httpx

from fluxc.cli import main
from fluxc.serve.server import open_socket


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A model.flux of the toy decoder, with a tokenizer."""
    from fluxc.testing import ToyConfig, tiny_tokenizer, toy_program
    from fluxc.tiny_tokenizer import VOCAB
    from fluxc.toy_flux import toy_flux

    folder = tmp_path_factory.mktemp("serve")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    files = {path.name: path.read_text() for path in (folder / "tokenizer").iterdir()}
    captured = toy_program(ToyConfig(windows=(0, 16, 0), vocab=VOCAB))
    return toy_flux(folder / "engine", captured, tokenizer_files=files).path


@pytest.fixture(scope="module")
def onnx(flux, tmp_path_factory):
    """Its ONNX engine."""
    import fluxc

    output = tmp_path_factory.mktemp("onnx") / "engine"
    return fluxc.export(flux, target="onnx", output=output, verify=False).path


def free_port() -> int:
    with open_socket("127.0.0.1", 0) as probe:
        return probe.getsockname()[1]


def first_answer(url: str, process: subprocess.Popen) -> dict:
    body = {"model": "engine", "prompt": "The key", "max_tokens": 4, "temperature": 0}
    while process.poll() is None:
        try:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        except httpx.ConnectError:
            time.sleep(0.02)
    raise AssertionError("the server ended")


FLUXC = [sys.executable, "-P", "-m", "fluxc"]
# The command as it is, over an engine that is made in no time.
TOY = """
import sys, fluxc
from fluxc.cli import main
from fluxc.engine.engine import Engine
from fluxc.testing import tiny_tokenizer
from fluxc.tiny_tokenizer import VOCAB
from fluxc.toy_engine import ToyPrograms, toy_plan

plan = toy_plan([(2, 6)])
ToyPrograms.vocabulary = VOCAB
fluxc.load = lambda path, **options: Engine(ToyPrograms(plan), plan, tokenizer=tiny_tokenizer())
sys.exit(main(sys.argv[1:]))
"""


def served(command: list[str], log) -> None:
    """Starts a server, asks it once, and ends it with SIGTERM."""
    port = free_port()
    more = ["--name", "engine", "--port", str(port), "--drain-seconds", "9"]
    with log.open("wb") as err, subprocess.Popen([*command, *more], stderr=err, stdout=subprocess.DEVNULL) as process:
        answer = first_answer(f"http://127.0.0.1:{port}", process)
        assert answer["model"] == "engine" and answer["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["serving", "request", "draining", "stopped"]
    assert lines[1]["status"] == 200 and lines[1]["tokens"] == 4 and "The key" not in log.read_text()


def test_from_its_start_to_sigterm(tmp_path):
    served([sys.executable, "-P", "-c", TOY, "serve", "toy"], tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux", "onnx"])
def test_real_engines_from_their_start_to_sigterm(kind, request, tmp_path):
    served([*FLUXC, "serve", str(request.getfixturevalue(kind))], tmp_path / "log")


MAKING = {"capture", "calibrate", "train", "evaluate"}


def test_the_server_imports_nothing_that_makes_models():
    code = "import sys, fluxc.serve.server, fluxc.engine.load\nprint(*sys.modules)"
    assert not (MAKING | {"torch", "transformers", "passes"}) & modules_of(code)


@pytest.mark.slow
@pytest.mark.parametrize("kind, heavy", [("flux", set()), ("onnx", {"torch", "transformers", "onnx", "passes"})])
def test_a_server_with_its_engine_has_loaded_nothing_that_makes_models(kind, heavy, request):
    assert not (MAKING | heavy) & loaded_by(request.getfixturevalue(kind))


def loaded_by(engine) -> set[str]:
    """Packages, and parts of fluxc, that a server of this engine has loaded after an answer."""
    code = (
        "import sys, fluxc\nfrom fluxc.serve.app import create_app\nfrom fluxc.serve.server import serve\n"
        f"engine = fluxc.load({str(engine)!r})\napp = create_app(engine)\n"
        "engine.generate('The key', max_new_tokens=2, temperature=0.7)\nprint(*sys.modules)"
    )
    return modules_of(code)


def modules_of(code: str) -> set[str]:
    """Packages, and parts of fluxc, among the modules that the code prints."""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in found.stdout.split() if "." not in name}
    parts = {name.split(".")[1] for name in found.stdout.split() if name.startswith("fluxc.")}
    assert "serve" in parts
    return loaded | parts


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["missing"], "missing does not exist"),
        ([], "no engine is named"),
        (["engine", "--config", "missing.toml"], "missing.toml cannot be read"),
        (["engine", "--api-keys", "missing.txt"], "missing.txt cannot be read"),
        (["engine", "--context", "1"], "--context"),
    ],
)
def test_what_cannot_be_served_is_named(arguments, reason, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *arguments, "--port", "0"]) == 2
    assert reason in capfd.readouterr().err


@pytest.mark.slow
def test_a_damaged_engine_is_named(flux, tmp_path, capfd):
    shutil.copytree(flux, tmp_path / "engine")
    (tmp_path / "engine" / "routers.safetensors").write_bytes(b"nothing")
    assert main(["serve", str(tmp_path / "engine"), "--port", "0"]) == 2
    assert "routers.safetensors" in capfd.readouterr().err


def test_a_port_in_use_is_said_before_the_engine_is_read(tmp_path, capfd):
    with open_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path / "engine"), "--port", port]) == 2
    assert f"port {port} is in use" in capfd.readouterr().err


def test_the_help_imports_nothing_heavy():
    code = "import sys\nfrom fluxc.cli import main\nmain(['serve', '--help'])\n"
    code += "print('fastapi' in sys.modules, file=sys.stderr)"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert "--max-batch" in found.stdout and found.stderr.strip() == "False"
