"""`fluxc transform`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxc.cli.budgets import budget_options
from fluxc.cli.capture import dtype_option, find, model_argument
from fluxc.cli.command import command
from fluxc.cli.devices import chosen_device, device_option
from fluxc.cli.outputs import check_flux
from fluxc.cli.screen import Screen
from fluxc.cli.verified import verified_lines

if TYPE_CHECKING:
    from fluxc.calibrate.options import CalibrateOptions
    from fluxc.calibrate.transform import Transformed


@command(
    "transform",
    makes=True,
    examples="""
    fluxc transform model.pt --budget 0.4
    fluxc transform smollm2 --budget 0.4 --effort quick
    fluxc transform path/to/model-folder --sparse-ratio 0.6 --sparse-kind streaming -o mine.flux
    fluxc transform path/to/model-folder --budget 0.4 --link
    fluxc transform model.pt --budget 0.3 --prompts mine.jsonl
    """,
)
@model_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: <name of MODEL>.flux]"
)
@budget_options
@click.option(
    "--effort", default="normal", show_default=True, metavar="quick|normal|thorough", help="How much to measure."
)
@click.option("--sparse-kind", default="auto", show_default=True, metavar="auto|streaming|triangle|block")
@click.option(
    "--full-kind",
    default="dense",
    show_default=True,
    metavar="dense|block",
    help="What full layers read of the prompt.",
)
@click.option("--threshold", default=0.9, show_default=True, help="Share of the weight that the kind block reads.")
@click.option("--sink", type=int, help="First tokens every row sees.  [default: by context]")
@click.option("--window", type=int, help="Last tokens every row sees.  [default: by context]")
@click.option(
    "--decode", default="sparse", show_default=True, metavar="sparse|full", help="What the answer's rows see."
)
@click.option(
    "--pool", type=int, default=100, show_default=True, help="First and last prompt tokens that the routers read."
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, metavar="INTEGER", show_default=True)
@click.option("--prompts", type=click.Path(path_type=Path), help="Your prompts: JSONL with prompt, answer, task.")
@click.option("--routers", type=click.Path(path_type=Path), help="Trained routers of MODEL (safetensors) to use.")
@click.option("--dump-dir", type=click.Path(path_type=Path), help="Write the program after each pass there.")
@click.option("--link", is_flag=True, help="Do not copy the weights: refer to the files of the folder MODEL by hash.")
@dtype_option
@device_option
def transform(
    screen: Screen,
    model: str,
    output: Path | None,
    budget: float | None,
    prompts: Path | None,
    routers: Path | None,
    dump_dir: Path | None,
    dtype: str | None,
    device: str | None,
    link: bool,
    force: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Put a calibrated Layer Router in front of every attention of MODEL.

    MODEL is all that `fluxc capture` takes. At most the share --budget of the routable layers runs full attention,
    averaged over prompts; 0.4 if not given. Without --prompts a built-in set is used. Interrupted work is resumed by
    the same command. --full-kind block lets full layers read scored blocks of the prompt, and is kept only where that
    costs at most 0.5 % on held-out prompts. With --link the result needs MODEL's safetensors files, unchanged, as long
    as it lives.
    """
    from fluxc.calibrate import transform as library
    from fluxc.linking import source_files

    options = _options(budget, settings)
    target = check_flux(output or library.default_output(model), force)
    if prompts:
        _check_prompts(prompts)
    if routers:
        _check_routers(routers)
    linked = source_files(model) if link else ()
    if dry_run:
        return _announce(screen, find(model), target, options, prompts, linked)
    screen.kept_in = target.with_name(target.name + ".measuring")
    done = library.transform(
        model,
        target,
        options=options,
        prompts=prompts,
        dtype=dtype,
        device=chosen_device(device),
        dump_dir=dump_dir,
        link=link,
        routers=routers,
        force=force,
        progress=screen.progress(),
    )
    return _report(screen, done, linked)


def _options(budget: float | None, settings: dict[str, Any]) -> CalibrateOptions:
    from fluxc.calibrate.options import CalibrateOptions

    asked = settings if budget is None else {**settings, "budget": budget}
    return CalibrateOptions.from_dict(asked)


def _check_prompts(prompts: Path) -> None:
    """A bad line is found before the model is loaded."""
    from fluxc.data import read_jsonl

    read_jsonl(prompts)


def _check_routers(routers: Path) -> None:
    from fluxc.train.published import read_routers

    read_routers(routers)


def _announce(
    screen: Screen,
    found: dict[str, Any],
    target: Path,
    options: CalibrateOptions,
    prompts: Path | None,
    linked: Sequence[Path],
) -> None:
    from fluxc.calibrate.options import EFFORTS

    effort = EFFORTS[options.effort]
    screen.show(
        f"would capture {found['name']} ({found['kind']}), calibrate it to budget {options.budget:g} "
        f"(Ω {1 - options.budget:g}) and write {target}",
        f"effort {options.effort}: at most {effort.measured} prompts measured, {effort.heldout} held out; "
        f"gives up: {effort.gives_up}",
        *_links(linked),
    )
    plain = {"dry_run": True, "model": found, "output": str(target), "options": options.to_dict()}
    screen.result({**plain, "prompts": str(prompts) if prompts else None, "linked": list(map(str, linked))})


def _report(screen: Screen, done: Transformed, linked: Sequence[Path]) -> None:
    screen.show(*verified_lines(done.plan, done.report), *_links(linked))
    screen.show(f"wrote {done.path} in {done.report['seconds']:.0f} s; next: fluxc run {done.path} --prompt-file FILE")
    result = {"output": str(done.path), "plan": done.plan.to_dict(), "report": done.report}
    screen.result({**result, "linked": list(map(str, linked))})


def _links(linked: Sequence[Path]) -> list[str]:
    """Where linked weights stay."""
    if not linked:
        return []
    files = linked[0].name if len(linked) == 1 else f"{len(linked)} files"
    return [f"[bold]weights[/]  linked, not copied: {files} in {linked[0].parent} must stay there, unchanged"]
