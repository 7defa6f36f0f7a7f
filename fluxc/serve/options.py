"""How a server is set up: on one machine, or as replicas of a Ray cluster; one TOML file for both."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Self

from fluxc.errors import OptionError
from fluxc.options import Options

ENGINE_OPTIONS = ("max_batch", "kv_memory", "admission", "max_decode_stall_ms", "context")


@dataclasses.dataclass(frozen=True)
class RayOptions(Options):
    """Replicas on a Ray cluster.

    `replicas`: how many, where `max_replicas` is 0; else Ray keeps between `min_replicas` and `max_replicas`, aiming at
    `target_requests` running ones each. `cpus`, `gpus`: of one replica. `application`: Ray's name for it. `address`:
    of the cluster, "" for one that runs here, started if need be.
    """

    replicas: int = 2
    min_replicas: int = 1
    max_replicas: int = 0
    target_requests: float = 16.0
    cpus: float = 1.0
    gpus: float = 0.0
    application: str = "fluxc"
    address: str = ""

    def __post_init__(self) -> None:
        _at_least(self, {"replicas": 1, "min_replicas": 0, "max_replicas": 0, "cpus": 0, "gpus": 0})
        if self.target_requests <= 0:
            raise OptionError(f"target_requests {self.target_requests} is not above 0")
        if self.max_replicas and self.min_replicas > self.max_replicas:
            raise OptionError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")


@dataclasses.dataclass(frozen=True)
class ServeOptions(Options):
    """One server, or one replica.

    `engine`: the directory, a model.flux or what `fluxc export` made. `name`: the model's name for clients, the
    directory's by default. `max_batch`, `kv_memory`, `admission`, `max_decode_stall_ms`, `context`: as in
    EngineOptions. `max_queue`: answers that may wait beside those of the batch; one more is refused with 429.
    `max_new_tokens`: most a request may ask for, None for what the context leaves. `max_choices`: prompts times n of
    one request. `max_body_bytes`, `max_json_depth`, `body_seconds`: of a request's body. `drain_seconds`: after SIGTERM
    running answers have that long to end. `api_keys`: a file with one key a line, "" for none. `conversations`: kept
    caches of sessions, the one longest unused goes first. `log_prompts`: put prompts into the log.
    """

    engine: str = ""
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    device: str | None = None
    max_batch: int = 16
    kv_memory: int | None = None
    admission: str = "worst"
    max_decode_stall_ms: float = 50.0
    context: int | None = None
    max_queue: int = 128
    max_new_tokens: int | None = None
    max_choices: int = 16
    max_body_bytes: int = 4 * 1024 * 1024
    max_json_depth: int = 32
    body_seconds: float = 30.0
    drain_seconds: float = 30.0
    api_keys: str = ""
    conversations: int = 64
    log_prompts: bool = False
    ray: RayOptions = dataclasses.field(default_factory=RayOptions)

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_queue": 0, "max_new_tokens": 1, "max_choices": 1, "max_body_bytes": 1}
        _at_least(self, {**least, "max_json_depth": 1, "drain_seconds": 0, "conversations": 0, "port": 0})
        if self.port > 65535:
            raise OptionError(f"port {self.port} is not in 0..65535")
        if self.body_seconds <= 0:
            raise OptionError(f"body_seconds {self.body_seconds} is not above 0")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """As Options; `ray` may be a mapping."""
        ray = values.get("ray", {})
        if isinstance(ray, dict):
            values = {**values, "ray": RayOptions.from_dict(ray)}
        return super().from_dict(values)

    @classmethod
    def read(cls, path: Path | None, **given: Any) -> Self:
        """The options of a TOML file, with the `given` ones that are not None over them.

        Raises OptionError for a file that cannot be read, and for names or values that are not known.
        """
        values = _table(path) if path else {}
        return cls.from_dict({**values, **{name: value for name, value in given.items() if value is not None}})

    @property
    def model(self) -> str:
        """The model's name for clients."""
        return self.name or Path(self.engine).resolve().name

    @property
    def capacity(self) -> int:
        """Answers that may run or wait at a time."""
        return self.max_batch + self.max_queue

    def engine_options(self) -> dict[str, Any]:
        """What `fluxc.load` is given beside the path."""
        values = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        return {"device": self.device, **values}


def _table(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise OptionError(f"{path} cannot be read: {cause.strerror}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise OptionError(f"{path} is no TOML: {cause}") from cause
    if "engine" in found:
        # As written, a path is relative to the file that names it.
        found["engine"] = str(path.parent / str(found["engine"]))
    return found


def _at_least(options: Options, least: dict[str, int]) -> None:
    for name, low in least.items():
        value = getattr(options, name)
        whole = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (whole and value >= low):
            raise OptionError(f"{name} {value!r} is not a number >= {low}")
