"""`fluxc serve`."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.errors import OptionError, TargetError

if TYPE_CHECKING:
    from fluxc.serve.options import ServeOptions


@command(
    "serve",
    examples="""
    fluxc serve engine/
    fluxc serve model.flux --port 9000 --max-batch 8 --api-keys keys.txt
    fluxc serve --config serve.toml
    fluxc serve --config serve.toml --ray
    """,
)
@click.argument("engine", metavar="[ENGINE]", required=False, type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file of options; those given here go first.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes any free one.  [default: 8000]")
@click.option("--name", help="The model's name for clients.  [default: the name of ENGINE]")
@click.option("--max-batch", type=click.IntRange(min=1), help="Answers that decode together.  [default: 16]")
@click.option("--max-queue", type=click.IntRange(min=0), help="Answers that may wait; then 429.  [default: 128]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Most tokens of an answer.")
@click.option("--context", type=click.IntRange(min=2), help="Most tokens of a prompt and its answer.")
@click.option("--kv-memory", type=click.IntRange(min=1), metavar="BYTES", help="Size of the KV pool.")
@click.option("--api-keys", metavar="FILE", help="Keys to let in, one a line.  [default: everybody]")
@click.option("--drain-seconds", type=click.FloatRange(min=0), help="For running answers on SIGTERM.  [default: 30]")
@click.option("--log-prompts", is_flag=True, default=None, help="Put prompts into the log.")
@click.option("--device", help="cpu or cuda; a GPU if there is one and the engine can use it.")
@click.option("--ray", "on_ray", is_flag=True, help="Serve with Ray: the table [ray] of the file says how.")
@click.option("--replicas", type=click.IntRange(min=1), help="With --ray: how many.")
@click.option("--detach", is_flag=True, help="With --ray: return once it runs; the cluster keeps it.")
def serve(
    screen: Screen,
    engine: Path | None,
    config: Path | None,
    on_ray: bool,
    replicas: int | None,
    detach: bool,
    **given: Any,
) -> None:
    """Serve ENGINE, or a model.flux, as OpenAI's HTTP interface does: completions and chat, streamed or whole.

    Beside OpenAI's parameters requests may have `budget`; answers have `fluxc` with routes, Ω and times. /metrics is
    for Prometheus, /health says whether requests are taken. On SIGTERM running answers are finished. Logs are JSON
    lines on standard error.
    """
    settings = _settings(engine, config, replicas, given)
    _check_libraries(on_ray)
    if on_ray:
        _serve_on_ray(screen, settings, detach)
    else:
        _serve_here(screen, settings)


def _settings(engine: Path | None, config: Path | None, replicas: int | None, given: dict[str, Any]) -> ServeOptions:
    import dataclasses

    from fluxc.serve.options import ServeOptions

    found = ServeOptions.read(config, engine=None if engine is None else str(engine), **given)
    if replicas is not None:
        found = dataclasses.replace(found, ray=dataclasses.replace(found.ray, replicas=replicas, max_replicas=0))
    if not found.engine:
        raise OptionError("no engine is named", hint="fluxc serve ENGINE, or `engine` in the file of --config")
    return found


def _check_libraries(on_ray: bool) -> None:
    import importlib.util

    names = ["fastapi", "uvicorn", "prometheus_client", *(["ray"] if on_ray else [])]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        extra = "serve,ray" if on_ray else "serve"
        raise TargetError(f"serving needs {missing[0]}, which is not installed", hint=f"pip install 'fluxc[{extra}]'")


def _serve_here(screen: Screen, settings: ServeOptions) -> None:
    from fluxc.serve.logs import log, set_up
    from fluxc.serve.server import open_socket

    set_up(screen.quiet)
    # Before the engine is loaded: a port in use is said at once.
    with open_socket(settings.host, settings.port) as listening:
        import fluxc
        from fluxc.serve.keys import ApiKeys
        from fluxc.serve.server import serve as run

        ApiKeys.read(settings.api_keys)
        with fluxc.load(settings.engine, **settings.engine_options()) as engine:
            engine.warm_up()
            url = _url(listening)
            log("serving", model=settings.model, url=url)
            screen.show(f"serving {settings.model} at {url}/v1")
            run(engine, settings, listening)
    log("stopped")


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _serve_on_ray(screen: Screen, settings: ServeOptions, detach: bool) -> None:
    from fluxc.serve.cluster import deploy, wait

    deployed = deploy(settings)
    screen.show(f"serving {settings.model} on Ray at {deployed.url}/v1")
    screen.result({"model": settings.model, "url": deployed.url, "application": settings.ray.application})
    if not detach:
        wait(deployed)
