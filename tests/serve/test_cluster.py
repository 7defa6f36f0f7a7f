"""Two replicas on this machine: sessions stay with theirs, one is killed under load, a new engine replaces both."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

pytest.importorskip("ray.serve", reason="replicas need the extra `ray`: pip install 'fluxc[serve,ray]'")

from fluxc.serve.server import open_socket

openai = pytest.importorskip("openai", reason="the official client is installed with fluxc[test]")
pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "Where is the key?"}]
ASK = {"model": "toy", "prompt": "The key is", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An ONNX engine of the toy decoder, with a tokenizer."""
    import fluxc
    from fluxc.testing import ToyConfig, tiny_tokenizer, toy_program
    from fluxc.tiny_tokenizer import VOCAB
    from fluxc.toy_flux import toy_flux

    folder = tmp_path_factory.mktemp("cluster")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    files = {path.name: path.read_text() for path in (folder / "tokenizer").iterdir()}
    captured = toy_program(ToyConfig(windows=(0, 16, 0), vocab=VOCAB))
    flux = toy_flux(folder / "toy.flux", captured, tokenizer_files=files)
    return fluxc.export(flux.path, target="onnx", output=folder / "engine", verify=False).path


@pytest.fixture(scope="module")
def config(engine, tmp_path_factory):
    """The file that one machine and a cluster are set up by."""
    path = tmp_path_factory.mktemp("config") / "serve.toml"
    path.write_text(
        f'engine = "{engine}"\nname = "toy"\nmax_batch = 4\nkv_memory = 50_000_000\ndrain_seconds = 20\n'
        "[ray]\nreplicas = 2\ncpus = 0.1\n"
    )
    return path


@pytest.fixture(scope="module")
def cluster(config):
    import ray
    from ray import serve

    from fluxc.serve.cluster import deploy
    from fluxc.serve.options import ServeOptions

    with open_socket("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    deployed = deploy(ServeOptions.read(config, port=port))
    try:
        yield deployed
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="any", max_retries=0, timeout=120) as made:
        yield made


def replica_of(url: str, session: str) -> str:
    """The replica that a session's requests go to."""
    name: str = httpx.get(f"{url}/health", headers={"x-session-id": session}, timeout=60).json()["server"]
    return name


def test_the_command_serves_on_ray_until_sigterm(config):
    with open_socket("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "fluxc", "serve", "--config", str(config), "--ray", "--replicas", "1"]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == f"serving toy on Ray at http://127.0.0.1:{port}/v1\n"
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", timeout=60) as client:
            assert client.completions.create(**ASK, max_tokens=3).usage.completion_tokens == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_answers_whole_and_streamed_and_errors_are_those_of_one_server(client):
    whole = client.completions.create(**ASK, max_tokens=8)
    parts = list(client.completions.create(**ASK, max_tokens=8, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert whole.model_extra["fluxc"]["routes"]
    with pytest.raises(openai.BadRequestError, match=r"outside 0\.\.1"):
        client.completions.create(**{**ASK, "extra_body": {"budget": 3}})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(**{**ASK, "model": "other"})


def test_a_session_stays_with_its_replica(cluster, client):
    found = {session: {replica_of(cluster.url, session) for _ in range(6)} for session in map(str, range(12))}
    assert all(len(replicas) == 1 for replicas in found.values())
    assert len(set.union(*found.values())) == 2
    talk = MESSAGES
    for _ in range(3):
        headers = {"x-session-id": "one"}
        answer = client.chat.completions.create(model="toy", messages=talk, max_tokens=5, extra_headers=headers)
        talk = [*talk, answer.choices[0].message.model_dump(include={"role", "content"}), *MESSAGES]
    text = httpx.get(f"{cluster.url}/metrics", headers={"x-session-id": "one"}, timeout=60).text
    assert "fluxc_kv_kept_bytes 0.0" not in text


async def ask(client, at: int, outcomes: list) -> None:
    """One request; its text, or the error it failed with."""
    try:
        found = await client.completions.create(**ASK, max_tokens=120, seed=at)
        outcomes.append(found.choices[0].text)
    except openai.APIError as fault:
        outcomes.append(fault)


def test_a_killed_replica_loses_its_running_requests_alone(cluster, client):
    import ray

    alone = client.completions.create(**ASK, max_tokens=120).choices[0].text

    async def load(retries: int) -> list:
        outcomes: list = []
        async with openai.AsyncOpenAI(
            base_url=f"{cluster.url}/v1", api_key="any", max_retries=retries, timeout=120
        ) as many:
            tasks = [asyncio.create_task(ask(many, at, outcomes)) for at in range(24)]
            while not outcomes:
                await asyncio.sleep(0.01)
            victim = replicas()[0]
            ray.kill(ray.get_actor(victim, namespace="serve"))
            await asyncio.gather(*tasks)
        await asyncio.to_thread(wait_for_replicas, 2, victim)
        return outcomes

    outcomes = asyncio.run(load(0))
    lost = [one for one in outcomes if isinstance(one, Exception)]
    # Both replicas had some of the 24: some are lost, some are not.
    assert 0 < len(lost) < 24
    assert {one for one in outcomes if isinstance(one, str)} == {alone}
    for fault in lost:
        # What the client itself would ask again: a connection that broke, or a status from 500 on.
        assert isinstance(fault, (openai.APIConnectionError, openai.InternalServerError)), fault
    assert asyncio.run(load(5)) == [alone] * 24


def replicas() -> list[str]:
    """Their actors."""
    from ray.util import list_named_actors

    names = [one["name"] for one in list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if name.startswith("SERVE_REPLICA"))


def wait_for_replicas(count: int, gone: str) -> None:
    """Until so many run, and `gone` is none of them."""
    from ray import serve

    end = time.monotonic() + 120
    while time.monotonic() < end:
        states = serve.status().applications["fluxc"].deployments["replica"].replica_states
        if states == {"RUNNING": count} and len(replicas()) == count and gone not in replicas():
            return
        time.sleep(0.2)
    raise AssertionError(f"the replicas are {states}")


def test_a_new_engine_replaces_the_old_one_without_a_lost_request(cluster, client, engine, tmp_path):
    import dataclasses
    import threading

    import fluxc
    from fluxc.serve.cluster import deploy

    before = client.completions.create(**ASK, max_tokens=2).system_fingerprint
    # Anew to the same place: the options are the same, the directory is not.
    shutil.copytree(engine, tmp_path / "engine")
    fluxc.calibrate(tmp_path / "engine", budget=0.3)
    prints, stop = [], threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            prints.append(client.completions.create(**ASK, max_tokens=40).system_fingerprint)

    threads = [threading.Thread(target=go_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        deploy(dataclasses.replace(cluster.settings, engine=str(tmp_path / "engine")))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    after = client.completions.create(**ASK, max_tokens=2).system_fingerprint
    assert before != after and set(prints) <= {before, after} and prints.count(before) > 0
