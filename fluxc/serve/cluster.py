"""The same app on Ray Serve: several replicas, each with an engine of its own.

A session's requests go to one replica (consistent hashing of the header `x-session-id`). Deploying again with another
engine, or one exported anew to the same place, replaces the replicas one by one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
from pathlib import Path
from typing import Any

import ray
from ray import serve

from fluxc.errors import ArchiveError, OptionError
from fluxc.options import canonical_digest
from fluxc.serve.options import ServeOptions
from fluxc.serve.server import open_socket

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
MANIFESTS = ("engine.json", "manifest.json")
SPARE = 16
"""Requests a replica takes beyond its queue, for the app itself to refuse them with 429."""


class Replica:
    """One engine and its app; a deployment of Ray Serve.

    `settings`: ServeOptions as a plain dict. `version`: of the engine, so that Ray tells a new one from the old.
    """

    def __init__(self, settings: dict[str, Any], version: str = "") -> None:
        import fluxc

        self.version, self.settings = version, ServeOptions.from_dict(settings)
        self.engine = fluxc.load(self.settings.engine, **self.settings.engine_options())
        self.engine.warm_up()

    def __serve_build_asgi_app__(self) -> Any:
        """Ray asks for the app once the replica is made."""
        from fluxc.serve.app import create_app
        from fluxc.serve.logs import set_up

        set_up()
        return create_app(self.engine, self.settings)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """An application that runs. `ours`: Ray was started here, and ends with it."""

    settings: ServeOptions
    ours: bool

    @property
    def url(self) -> str:
        """Where the proxy of this machine listens."""
        return f"http://{self.settings.host}:{self.settings.port}"


def build(settings: ServeOptions | dict[str, Any]) -> Any:
    """A Ray Serve application of the app; also for Ray's own config files (`import_path: fluxc.serve.cluster:build`).

    Raises ArchiveError where the engine is not there.
    """
    chosen = settings if isinstance(settings, ServeOptions) else ServeOptions.from_dict(settings)
    chosen = dataclasses.replace(chosen, engine=str(Path(chosen.engine).resolve()), name=chosen.model)
    made = serve.deployment(name="replica", **_how(chosen))(serve.ingress()(Replica))
    return made.bind(chosen.to_dict(), _version(chosen))


def deploy(settings: ServeOptions) -> Deployed:
    """Start the application, or replace the one that runs; returns once its replicas answer.

    Raises OptionError for a port in use or replicas that do not start, ArchiveError for an engine that is not there.
    """
    application = build(settings)
    ours = _connect(settings)
    if not _serve_runs():
        open_socket(settings.host, settings.port).close()
    serve.start(http_options={"host": settings.host, "port": settings.port})
    try:
        serve.run(application, name=settings.ray.application, route_prefix="/")
    except RuntimeError as cause:
        raise OptionError(
            f"the replicas do not start: {cause}", hint="`ray serve status` and its logs say why"
        ) from cause
    return Deployed(settings, ours)


def wait(deployed: Deployed) -> None:
    """Return when a signal comes; a Ray that was started here is shut down, its replicas drained."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    if deployed.ours:
        serve.shutdown()
        ray.shutdown()


def _how(settings: ServeOptions) -> dict[str, Any]:
    own = settings.ray
    scaling: dict[str, Any] = {"num_replicas": own.replicas}
    if own.max_replicas:
        limits = {"min_replicas": own.min_replicas, "max_replicas": own.max_replicas}
        scaling = {"autoscaling_config": {**limits, "target_ongoing_requests": own.target_requests}}
    return {
        **scaling,
        "max_ongoing_requests": settings.capacity + SPARE,
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "ray_actor_options": {"num_cpus": own.cpus, "num_gpus": own.gpus},
        "request_router_config": {"request_router_class": ROUTER},
    }


def _version(settings: ServeOptions) -> str:
    """Changes with the options and with what the engine directory holds."""
    for name in MANIFESTS:
        path = Path(settings.engine) / name
        if path.is_file():
            known = {key: value for key, value in settings.to_dict().items() if key != "ray"}
            return canonical_digest([hashlib.sha256(path.read_bytes()).hexdigest(), known])[:16]
    raise ArchiveError(f"{settings.engine} is no engine directory", hint="`fluxc export` writes one")


def _connect(settings: ServeOptions) -> bool:
    """Join the cluster, or start one here; whether it was started."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "serve"}
    try:
        ray.init(address=settings.ray.address or "auto", **quiet)
        return False
    except ConnectionError as cause:
        if settings.ray.address:
            raise OptionError(f"no Ray cluster at {settings.ray.address}") from cause
    ray.init(include_dashboard=False, **quiet)
    return True


def _serve_runs() -> bool:
    try:
        return bool(serve.status().proxies)
    except Exception:  # whatever Ray raises where Serve was never started
        return False
