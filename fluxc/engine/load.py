"""`fluxc.load`: an engine from a model.flux directory, or from what `fluxc export` made of one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxc.engine.engine import Engine
from fluxc.engine.options import EngineOptions
from fluxc.errors import OptionError, PlanError
from fluxc.exporters import engine_dir
from fluxc.exporters.engine_dir import EngineDir
from fluxc.plan import Plan, default_crossover

if TYPE_CHECKING:
    from fluxc.flux_dir import FluxDir
    from fluxc.runtime.model import FluxModel

# torch and what reads graphs of torch.export take seconds to import, and ONNX engines need none of it: functions that
# need them import them themselves.


def load(
    path: str | Path,
    device: str | None = None,
    *,
    plan: str | Path | Plan | None = None,
    verify_weights: bool = True,
    fuse: bool | None = None,
    **options: Any,
) -> Engine:
    """An engine that runs the model.flux or engine directory `path` on `device` (a GPU if there is one, else the CPU).

    `plan`: another plan of the same model, or its file. `verify_weights`: check the hashes of the weights too.
    `fuse`: whether the graphs of a model.flux run fused ops; None says so on a GPU (see TracedPrograms). `options`: see
    EngineOptions.

    Raises ArchiveError, naming the file, for a directory that is damaged; PlanError for a plan of another model;
    OptionError for a device that is not here, or unknown options; UnsupportedAttentionError for a model whose layers
    one cache cannot hold; TargetError for an engine whose runtime is not installed.
    """
    if (Path(path) / engine_dir.NAME).is_file():
        if fuse is not None:
            raise OptionError(f"{path} is an exported engine: its ops are chosen", hint="give `fuse` with a model.flux")
        return exported(engine_dir.open_engine(path), device, plan=plan, **options)
    from fluxc.flux_dir import open_flux
    from fluxc.runtime.model import FluxModel

    return engine_of(FluxModel(open_flux(path, verify_weights), _device(device)), plan=plan, fuse=fuse, **options)


def engine_of(
    model: FluxModel, *, plan: str | Path | Plan | None = None, fuse: bool | None = None, **options: Any
) -> Engine:
    """The engine of an opened model; both share the weights. `fuse`: as for `load`."""
    from fluxc.engine.traced import TracedPrograms
    from fluxc.runtime import crossover

    settings = EngineOptions.from_dict(options)
    chosen = _plan(model.flux, plan)
    return Engine(
        TracedPrograms(model.routed_program, context=chosen.model.context, fuse=fuse),
        chosen,
        tokenizer=model.tokenizer if model.has_tokenizer else None,
        eos_ids=[int(token) for token in model.meta.get("eos_ids", [])],
        crossover=functools.cache(
            lambda budget: crossover.of_plan(model.flux.device_file, chosen, budget, model.device)
        ),
        options=settings,
    )


def exported(
    made: EngineDir, device: str | None = None, *, plan: str | Path | Plan | None = None, **options: Any
) -> Engine:
    """The engine of an opened engine directory."""
    programs = _programs(made, device)
    most = {"max_batch": made.manifest.batch} if made.manifest.batch else {}
    settings = EngineOptions.from_dict(most | options)
    chosen = engine_dir.checked_plan(made, plan)
    return Engine(
        programs,
        chosen,
        tokenizer=_tokenizer(made.path / "tokenizer"),
        eos_ids=[int(token) for token in made.manifest.meta.get("eos_ids", [])],
        crossover=lambda budget: default_crossover(chosen),
        options=settings,
    )


def _programs(made: EngineDir, device: str | None) -> Any:
    """The programs of the engine's target; each imports its own runtime alone."""
    if made.manifest.target == "trt":
        from fluxc.exporters.trt_programs import TrtPrograms

        return TrtPrograms(made, device)
    if made.manifest.target == "aoti":
        from fluxc.exporters.aoti_programs import AotiPrograms

        return AotiPrograms(made, device)
    if made.manifest.target != "onnx" or (device or "cpu") != "cpu":
        where = f"an engine for {made.manifest.target} on {device or 'cpu'}"
        raise OptionError(f"fluxc cannot run {where} yet", hint="load an onnx engine on the CPU")
    from fluxc.exporters.onnx_programs import OnnxPrograms

    return OnnxPrograms(made)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`, None where there is none: by `tokenizers` alone where its files allow that."""
    from fluxc.engine.light_tokenizer import LightTokenizer

    if LightTokenizer.can_read(folder):
        return LightTokenizer(folder)
    if not folder.is_dir():
        return None
    from fluxc.runtime.tokenizer import read_tokenizer

    return read_tokenizer(folder)


def _plan(made: FluxDir, plan: str | Path | Plan | None) -> Plan:
    if plan is None:
        return made.plan
    from fluxc.passes.apply_plan import ApplyPlan

    other = plan if isinstance(plan, Plan) else Plan.load(plan)
    other.check_model(made.plan.model)
    if other.pool != made.plan.pool or ApplyPlan.of(other) != ApplyPlan.of(made.plan):
        raise PlanError(f"the plan has other kinds or sizes than the graph in {made.path}", hint="transform it again")
    return other


def _device(device: str | None) -> str:
    import torch

    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device {device}: torch sees no CUDA device", hint="`fluxc doctor` says why")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")
