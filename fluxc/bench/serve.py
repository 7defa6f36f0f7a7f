"""`python -m fluxc.bench.serve engine/`: a server under load, from a process of its own.

By default arrivals are open-loop at `--rate` a second, first with all layers full, then as the routers choose, with
the same prompts. With `--clients` so many clients wait for their answers, and every answer is compared with the one
the same server gives alone; then pages, tasks, files and memory must be what they were, and SIGTERM must let running
answers end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.screen import Screen
from fluxc.cli.tables import table

if TYPE_CHECKING:
    from rich.table import Table

    from fluxc.bench.load_client import Seen
    from fluxc.bench.load_requests import Mix
    from fluxc.bench.load_server import Server

SAMPLES = 8
"""Readings of memory during the checked run."""


@command(
    "serve",
    examples="""
    python -m fluxc.bench.serve engine/ --rate 2 --requests 100
    python -m fluxc.bench.serve engine/ --words 1500 --requests 20 --rate 0.2
    python -m fluxc.bench.serve engine/ --clients 64 --requests 1000 --cancel 0.1 --malformed 0.05
    """,
)
@click.argument("engine", type=click.Path(path_type=Path))
@click.option("--requests", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--rate", type=click.FloatRange(min=0.001), default=2.0, show_default=True, help="Arrivals a second.")
@click.option("--clients", type=click.IntRange(min=1), help="So many that wait for their answers, and are checked.")
@click.option("--distinct", type=click.IntRange(min=1), default=96, show_default=True, help="Different requests.")
@click.option("--cancel", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share that leaves early.")
@click.option("--malformed", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="Share that is broken.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--words", type=click.IntRange(min=0), default=0, help="Words of each prompt.  [default: mixed]")
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=60.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write everything there, as JSON.")
def serve(
    screen: Screen,
    engine: Path,
    requests: int,
    rate: float,
    clients: int | None,
    distinct: int,
    cancel: float,
    malformed: float,
    max_tokens: int,
    words: int,
    max_batch: int,
    drain_seconds: float,
    seed: int,
    output: Path | None,
) -> None:
    """Put `fluxc serve ENGINE` under load and say what its clients saw."""
    from fluxc.bench.load_requests import Mix
    from fluxc.bench.load_server import Server

    mix = Mix("model", requests, distinct, cancel, malformed, max_tokens, words, seed=seed)
    options = ["--max-batch", str(max_batch), "--drain-seconds", str(drain_seconds)]
    with tempfile.TemporaryDirectory() as folder, Server(engine, Path(folder) / "log", options) as server:
        result: dict[str, Any] = {"conditions": _conditions(engine, mix, max_batch), "start": server.first_answer()}
        run = _checked(screen, server, mix, clients) if clients else _compared(screen, server, mix, rate)
        result |= run | {"drain": _drain(server)}
    if output:
        output.write_text(json.dumps(result, indent=1))
    screen.show(_table(result["runs"]), *_lines(result))
    screen.result(result)


def _conditions(engine: Path, mix: Mix, max_batch: int) -> dict[str, Any]:
    from fluxc import __version__
    from fluxc.exporters.engine_dir import EngineManifest

    manifest = engine / "engine.json"
    made = EngineManifest.load(manifest).versions if manifest.is_file() else {}
    return {
        "engine": engine.name,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_before": os.getloadavg(),
        "max_batch": max_batch,
        "mix": dataclasses.asdict(mix),
        "versions": {"fluxc": __version__, "python": sys.version.split()[0], "engine": made},
    }


def _compared(screen: Screen, server: Server, mix: Mix, rate: float) -> dict[str, Any]:
    """The same arrivals dense and routed."""
    from fluxc.bench.load_client import Load
    from fluxc.bench.load_report import summary

    runs = {}
    for name, budgets in (("dense", (1.0,)), ("routed", (None,))):
        asks = dataclasses.replace(mix, budgets=budgets).asks()
        screen.progress().start(f"{name}: {rate:g} requests a second", len(asks))
        start = time.perf_counter()
        seen = asyncio.run(Load(server.url, screen.progress().advance).opened(asks, rate, mix.seed))
        runs[name] = summary(seen, time.perf_counter() - start)
        server.settled()
    return {"rate": rate, "runs": runs}


def _checked(screen: Screen, server: Server, mix: Mix, clients: int) -> dict[str, Any]:
    from fluxc.bench.load_client import Load
    from fluxc.bench.load_report import faults, summary

    asks = mix.asks()
    good = list({ask.key: ask for ask in asks if ask.kind == "good"}.values())
    screen.progress().start("alone", len(good))
    alone = asyncio.run(Load(server.url, screen.progress().advance).closed(good, 1))
    before = server.settled()
    watched, seen, start = [before], [], time.perf_counter()
    screen.progress().start(f"{clients} clients", len(asks))
    for part in _parts(asks, SAMPLES):
        seen += asyncio.run(Load(server.url, screen.progress().advance).closed(part, clients))
        watched.append(server.settled())
    seconds = time.perf_counter() - start
    return {
        "clients": clients,
        "runs": {"alone": summary(alone, sum(one.total for one in alone)), "under load": summary(seen, seconds)},
        "faults": faults(seen, {one.ask.key: one for one in alone}),
        "watched": watched,
    }


def _parts(asks: Sequence[Any], count: int) -> list[Sequence[Any]]:
    size = -(-len(asks) // count)
    return [asks[at : at + size] for at in range(0, len(asks), size)]


def _drain(server: Server) -> dict[str, Any]:
    """SIGTERM while answers run: what their clients saw, how long it took, and the exit code."""
    from fluxc.bench.load_client import Load
    from fluxc.bench.load_requests import COMPLETIONS, Ask

    body = {"model": "model", "prompt": "Once", "max_tokens": 24, "ignore_eos": True, "stream": True}
    asks = [Ask("good", COMPLETIONS, {**body, "seed": at}) for at in range(4)]

    async def both() -> list[Seen]:
        asked = asyncio.create_task(Load(server.url).closed(asks, len(asks)))
        while not (await asyncio.to_thread(server.watch))["fluxc_running"]:
            await asyncio.sleep(0.02)
        server.terminate()
        return await asked

    seen = asyncio.run(both())
    ended = server.wait()
    return {**ended, "asked": len(seen), "answered": sum(one.status == 200 and bool(one.finish) for one in seen)}


def _table(runs: dict[str, Any]) -> Table:
    head = ("run", "answered", "requests/s", "tokens/s", "Ω", "first token p50", "p99", "per token p50", "p99")
    made = table(*head, numbers=head[1:])
    for name, run in runs.items():
        first, each = run["first_token"] or {}, run["per_token"] or {}
        numbers = [run["requests_per_second"], run["tokens_per_second"], run["sparse_ratio"]]
        numbers += [first.get("p50"), first.get("p99"), each.get("p50"), each.get("p99")]
        cells = ("" if number is None else f"{number:.3f}" for number in numbers)
        made.add_row(name, f"{run['answered']} of {sum(run['statuses']['good'].values())}", *cells)
    return made


def _lines(result: dict[str, Any]) -> list[str]:
    drain = result["drain"]
    lines = [
        f"first answer {result['start']:.1f} s after the start",
        f"SIGTERM: {drain['answered']} of {drain['asked']} running answers ended, exit code {drain['exit_code']} "
        f"after {drain['seconds']:.1f} s",
    ]
    for name, run in result["runs"].items():
        lines.append(f"{name}: statuses {run['statuses']}, retries {run['retries']}, errors {run['errors']}")
    if "faults" in result:
        found, watched = result["faults"], result["watched"]
        sizes = ", ".join(f"{one['process_resident_memory_bytes'] / 1e6:.0f}" for one in watched)
        lines.append(f"{len(found['good_differing'])} of {found['good_compared']} answers differ from alone")
        lines.append(
            f"resident MB before and after each part: {sizes}; tasks {[one['fluxc_tasks'] for one in watched]}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(run_frame(command=serve, name="python -m fluxc.bench.serve"))
