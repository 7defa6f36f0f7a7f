"""`fluxc export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fluxc.cli.command import command
from fluxc.cli.export_options import given, target_options
from fluxc.cli.outputs import check_folder
from fluxc.cli.screen import Screen
from fluxc.cli.tables import size


@command(
    "export",
    makes=True,
    examples="""
    fluxc export --target onnx
    fluxc export model.flux --target onnx -o engine/
    fluxc export model.flux --target onnx --dry-run
    fluxc export --target trt --max-length 4096
    """,
)
@click.argument("model", metavar="[MODEL.flux]", required=False, type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="onnx|aoti|trt|torch-trt", help="What the engine runs on.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: engine-<target>]")
@click.option(
    "--verify/--no-verify", default=True, help="Compare with the routed program before keeping it.  [default: verify]"
)
@click.option("--dtype", metavar="float32|bfloat16|float16", help="What it computes in.  [default: the model's]")
@click.option("--device", metavar="cpu|cuda", help="What it runs on.  [default: cpu]")
@click.option("--pin", is_flag=True, help="Layers that the plan pins become attention without a conditional.")
@click.option("--layout", type=click.Choice(["triton-server"]), help="Write a model repository around the engine.")
@target_options
def export(
    screen: Screen,
    model: Path | None,
    target: str,
    output: Path | None,
    verify: bool,
    force: bool,
    dry_run: bool,
    dtype: str | None,
    device: str | None,
    pin: bool,
    layout: str | None,
    **options: Any,
) -> None:
    """Write an engine of MODEL.flux that runs without fluxc: prefill with its routers, decode, weights once.

    MODEL.flux may be left out where the working directory holds only one. One engine serves every budget: the biases
    are an input of the prefill program.
    """
    from fluxc.exporters import targets

    targets.exporter(target)  # a missing library is said before torch is even loaded
    from fluxc.exporters import export as library

    place = output or Path(f"engine-{target}")
    check_folder(place)
    done = library.export(
        model,
        target=target,
        output=place,
        verify=verify,
        force=force,
        dry_run=dry_run,
        dtype=dtype,
        device=device,
        pin=pin,
        layout=layout,
        options=given(options),
        progress=screen.progress(),
    )
    screen.show(*_lines(done.report))
    screen.result(done.report)


def _lines(report: dict[str, Any]) -> list[str]:
    what = f"{report['model']} to {report['engine']} for {report['target']}"
    count = report["routable"] - report["pinned"]
    layers = f"{count} of {report['attentions']} attentions become conditionals"
    if report["dry_run"]:
        first = f"would export {what}: {layers}, {size(report['weight_bytes'])} of weights"
        return [first, *(f"  {form}" for form in report["forms"])]
    verified = report["verified"]
    lines = [f"exported {what}: {layers}, {size(report['bytes'])}"]
    lines += [_built(name, built) for name, built in report.get("built", {}).items()]
    if verified:
        lengths = ", ".join(map(str, verified["lengths"]))
        lines.append(
            f"verified at {lengths} tokens: logits within {verified['prefill']:.1e} (prefill), "
            f"{verified['decode']:.1e} (decode)"
        )
    return lines


def _built(name: str, built: dict[str, Any]) -> str:
    """One engine of TensorRT, as it was read back."""
    what = f"{name}: {size(built['bytes'])}, built in {built['seconds']:.0f} s"
    if not built["routable"]:
        return what
    return f"{what}; {built['conditionals']} of {built['routable']} routable layers are conditionals in the engine"
