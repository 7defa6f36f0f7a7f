"""`fluxc report`."""

from __future__ import annotations

from pathlib import Path

import click

from fluxc.cli.command import command
from fluxc.cli.screen import Screen


@command(
    "report",
    makes=True,
    examples="""
    fluxc report model.flux
    fluxc report model.flux -o report.html --eval model.eval.json --bench model.bench.json
    fluxc report model.flux --png figures/
    """,
)
@click.argument("flux", metavar="MODEL.flux", type=click.Path(path_type=Path))
@click.option(
    "--eval", "evaluation", type=click.Path(path_type=Path), help="[default: NAME.eval.json, if there is one]"
)
@click.option("--bench", type=click.Path(path_type=Path), help="[default: NAME.bench.json, if there is one]")
@click.option("--png", type=click.Path(path_type=Path), metavar="DIR", help="Also write each figure there as PNG.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: NAME.html]")
def report(
    screen: Screen,
    flux: Path,
    evaluation: Path | None,
    bench: Path | None,
    png: Path | None,
    output: Path | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Draw what is known of MODEL.flux as one page: accuracy against Ω, routes, needs, time, memory, the plan in words.

    Nothing is measured: `fluxc eval` and `fluxc bench` store what this command draws. The page needs no network.
    """
    from fluxc.atomic import atomic_file
    from fluxc.cli.outputs import check_file
    from fluxc.report.figures import all_figures
    from fluxc.report.material import gather
    from fluxc.report.page import page, summary_of

    target = check_file(output or Path(f"{flux.absolute().stem}.html"), force)
    material = gather(flux, evaluation, bench)
    figures = all_figures(material)
    names = [figure.name for figure in figures]
    if dry_run:
        screen.show(f"would draw {', '.join(names)} into {target}")
        return screen.result({"output": str(target), "figures": names, "dry_run": True})
    if png:
        _write_figures(png, figures)
    with atomic_file(target, force=True) as temporary:
        temporary.write_text(page(material), encoding="utf-8")
    missing = [what for what, found in (("eval", material.evaluation), ("bench", material.bench)) if found is None]
    hint = f"; not drawn, because nothing is stored: {' and '.join(f'`fluxc {what}`' for what in missing)}"
    screen.show(f"{len(figures)} figures: {target}{hint if missing else ''}")
    return screen.result({"output": str(target), "figures": names, **summary_of(material)})


def _write_figures(folder: Path, figures: list) -> None:  # type: ignore[type-arg]
    from fluxc.atomic import storage_errors
    from fluxc.report.raster import write_png

    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            write_png(figure, folder / f"{figure.name}.png")
