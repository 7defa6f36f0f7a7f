"""`python -m fluxc.bench.shape --shape qwen3-8b`: the engine at a model's shape over random weights; speed only.

Prefill and decode against dense in one process, with the bound and the ideal of DESIGN section 1 beside every
speed-up, what routers cost, what is served below and above the crossover, and transformers' own decode. Nothing is
loaded or calibrated. Rows are measured in the order of their worth and written one by one: a run that is cut off at
its deadline, or fails in one row, leaves all others.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.app import run as run_frame
from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.screen import Screen
from fluxc.options import Options

if TYPE_CHECKING:
    from fluxc.bench.shape_model import RandomModel
    from fluxc.bench.shape_rows import Row, Rows

SECTIONS = ("check", "prefill", "decode", "overhead", "chosen", "crossover", "transformers")
SHAPES = ("qwen3-8b", "tiny")


@dataclasses.dataclass(frozen=True)
class Work(Options):
    """What is measured. Lengths in tokens: `lengths` of prefill, `decode_lengths` with `batches` sequences each,
    `overhead_length` of all full against dense, `sweep` of the crossover; the chosen routes and transformers take the
    first length. `ratios`: forced Ω. `repeats` of a prefill, at most as many as `row_seconds` allow; `steps` of
    decode. `fuse`: with the fused ops of `kernels`; None: as the engine does on this device."""

    lengths: tuple[int, ...] = (32768, 131072, 262144)
    decode_lengths: tuple[int, ...] = (32768, 131072)
    batches: tuple[int, ...] = (1, 8)
    ratios: tuple[float, ...] = (0.6, 1.0, 0.75, 0.45)
    sweep: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 12288, 16384, 32768)
    sweep_ratio: float = 0.6
    overhead_length: int = 8192
    repeats: int = 5
    row_seconds: float = 80.0
    steps: int = 30
    seed: int = 0
    fuse: bool | None = None


TINY = Work(
    lengths=(500, 1200),
    decode_lengths=(500,),
    batches=(1, 3),
    sweep=(16, 64, 200, 500),
    overhead_length=300,
    repeats=2,
    steps=5,
)


@command(
    "shape",
    examples="""
    python -m fluxc.bench.shape --shape qwen3-8b --deadline 500 -o shape.json
    python -m fluxc.bench.shape --shape qwen3-8b --only prefill --length 131072 --sparse-ratio 0.6
    """,
)
@click.option("--shape", "name", type=click.Choice(SHAPES), default=SHAPES[0], show_default=True)
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="Sections.  [default: all but transformers]")
@click.option("--transformers", is_flag=True, help="Also, last, transformers with a static cache and torch.compile.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(min=1), help="Of prefills, tokens.")
@click.option(
    "--decode-length", "decode_lengths", multiple=True, type=click.IntRange(min=1), help="Of prompts, tokens."
)
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), help="Sequences that decode together.")
@click.option("--sparse-ratio", "ratios", multiple=True, type=click.FloatRange(0, 1), help="Forced Ω.")
@click.option("--sweep", multiple=True, type=click.IntRange(min=1), help="Lengths of the crossover's sweep, growing.")
@click.option("--repeats", type=click.IntRange(min=1), help="Runs of a prefill.")
@click.option("--row-seconds", type=click.FloatRange(min=0), help="No further repeat of a row's prefills after that.")
@click.option("--steps", type=click.IntRange(1, 4000), help="Decode steps that are timed at a time.")
@click.option("--fuse/--no-fuse", default=None, help="Fused ops.  [default: on a GPU]")
@click.option("--deadline", type=click.FloatRange(min=0), default=0.0, help="Seconds after which nothing is begun.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write everything there, as JSON, row by row.")
@device_option
def shape(
    screen: Screen,
    name: str,
    only: tuple[str, ...],
    transformers: bool,
    deadline: float,
    output: Path | None,
    device: str | None,
    **given: Any,
) -> None:
    """Time the engine at the shape of a model, with random weights."""
    from fluxc.bench.shape_rows import Rows
    from fluxc.bench.shape_tables import shown

    where = chosen_device(device)
    work = dataclasses.replace(
        TINY if name == "tiny" else Work(), **{k: v for k, v in given.items() if v not in ((), None)}
    )
    wanted = only or tuple(s for s in SECTIONS if s != "transformers" or transformers)
    rows = Rows(conditions(name, where, work), output, deadline, where)
    for row in measured(rows, name, where, work, wanted):
        screen.show(*shown(row))
    screen.result(rows.found)


def measured(rows: Rows, name: str, device: str, work: Work, wanted: tuple[str, ...]) -> Iterator[Row]:
    """The rows, each when it is there. A red check is the last one: it gives no times."""
    from fluxc.bench.shape_model import random_model, shape_of
    from fluxc.bench.shape_transformers import transformers_row

    if wanted != ("transformers",):
        made: list[RandomModel] = []
        built = rows.take(
            "model", f"model {name}", lambda: _built(made, random_model(shape_of(name), device, work.seed, work.fuse))
        )
        yield built
        if not made:
            return
        for section, title, measure in _jobs(made.pop(), work, wanted, rows):
            row = rows.take(section, title, measure)
            yield row
            if section == "check" and "error" in row:
                return
    if "transformers" in wanted:
        length, steps = work.decode_lengths[0], work.steps
        title = f"transformers, decode after {length} tokens"
        yield rows.take("transformers", title, lambda: transformers_row(shape_of(name), device, length, steps))


def _built(made: list[RandomModel], model: RandomModel) -> Row:
    made.append(model)
    return {"weight_bytes": model.weight_bytes, "layers": len(model.programs.layers), "fuse": model.programs.fuse}


Job = tuple[str, str, Callable[[], Any]]


def _jobs(model: RandomModel, work: Work, wanted: tuple[str, ...], rows: Rows) -> Iterator[Job]:
    """Section, title and measurement of each row, those worth most first."""
    every = list(_all_jobs(model, work, rows))
    return (job for job in every if job[0] in wanted)


def _all_jobs(model: RandomModel, work: Work, rows: Rows) -> Iterator[Job]:
    from fluxc.bench.shape_check import check
    from fluxc.bench.shape_crossover import sweep
    from fluxc.bench.shape_routers import chosen_against_forced, router_overhead

    left, repeats, first = rows.left, work.repeats, work.lengths[0]
    yield "check", "check", lambda: check(model, work.seed)
    yield _prefill_job(model, work, first, rows)
    for batch in work.batches:
        yield _decode_job(model, work, work.decode_lengths[0], batch, rows)
    for length in work.lengths[1:2]:
        yield _prefill_job(model, work, length, rows)
    for length in work.decode_lengths[1:]:
        for batch in work.batches:
            yield _decode_job(model, work, length, batch, rows)
    yield (
        "overhead",
        f"routers, {work.overhead_length} tokens",
        lambda: router_overhead(model, work.overhead_length, repeats=3 * repeats, left=left),
    )
    yield (
        "chosen",
        f"chosen against forced, {first} tokens",
        lambda: chosen_against_forced(model, first, work.sweep_ratio, repeats=repeats, left=left),
    )
    yield (
        "crossover",
        "crossover",
        lambda: sweep(model, work.sweep, work.sweep_ratio, repeats=min(repeats, 3), left=left),
    )
    for length in work.lengths[2:]:
        yield _prefill_job(model, work, length, rows)


def _prefill_job(model: RandomModel, work: Work, length: int, rows: Rows) -> Job:
    from fluxc.bench.shape_prefill import against_dense

    def measure() -> Row:
        needed = _least_seconds(rows.found["rows"], length)
        if rows.left() < needed:
            return {"error": f"not begun: it needs {needed:.0f} s, and {rows.left():.0f} s were left"}
        limits = {"repeats": work.repeats, "most_seconds": work.row_seconds}
        return against_dense(model, length, work.ratios, left=rows.left, **limits)  # type: ignore[arg-type]

    return "prefill", f"prefill of {length} tokens", measure


def _least_seconds(rows: list[Row], length: int) -> float:
    """Of a dense run and the quickest others, as the longest prompt measured so far foretells; 0 for the first one."""
    known = [(row["length"], row["dense"]) for row in rows if row["section"] == "prefill" and "dense" in row]
    if not known:
        return 0.0
    longest, seconds = max(known)
    return 1.5 * seconds * max(1.0, length / longest) ** 2


def _decode_job(model: RandomModel, work: Work, length: int, batch: int, rows: Rows) -> Job:
    from fluxc.bench.shape_decode import Decodes, decode_row, pool_for

    def measure() -> Row:
        decodes = Decodes(model, pool_for(model, [length], [batch], work.steps))
        return decode_row(decodes, length, batch, work.ratios, steps=work.steps, repeats=2, left=rows.left)

    return "decode", f"decode after {length} tokens, batch {batch}", measure


def conditions(name: str, device: str, work: Work) -> Row:
    """What the numbers depend on."""
    import importlib.metadata

    from fluxc.artifact import versions
    from fluxc.bench.shape_model import LABEL, shape_of
    from fluxc.runtime.crossover import device_name

    known = {"shape": dataclasses.asdict(shape_of(name)), "label": LABEL, "device": device_name(device)}
    tools = versions() | {"triton": importlib.metadata.version("triton")}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**known, "work": work.to_dict(), "versions": tools, "date": date}


if __name__ == "__main__":
    sys.exit(run_frame(command=shape, name="python -m fluxc.bench.shape"))
