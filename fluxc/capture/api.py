"""`fluxc.capture`: any model fluxc reads, as one program in normal form."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from fluxc.capture.result import Capture, files_of_tokenizer, load_capture
from fluxc.errors import SourceError
from fluxc.progress import SILENT, Progress

_PROGRAMS = (".pt", ".pt2")


def capture(
    model: Any,
    *,
    tokenizer: Any = None,
    dtype: str | None = None,
    sample_inputs: tuple[Any, ...] | None = None,
    progress: Progress = SILENT,
) -> Capture:
    """Capture `model` into one `ExportedProgram` with dynamic batch and length, checked against its source.

    `model`: a Hugging Face directory or hub id, a `.gguf` file, `smollm2`, a `.pt` / `.pt2` file, a transformers
    causal LM, or any other nn.Module with `sample_inputs`. `tokenizer`: a transformers tokenizer, in place of the
    model's own. `dtype`: float32, bfloat16 or float16 in place of the source's. A module is not changed; the program
    shares its weights.

    Raises SourceError where there is no such model, CaptureError (UnsupportedAttentionError) for what fluxc does not
    represent, ArchiveError for a damaged or hostile file, SelfCheckError where the result differs from the source.
    """
    if isinstance(model, (str, Path)):
        found = _from_path(model, tokenizer, progress)
    else:
        found = _from_module(model, tokenizer, sample_inputs, progress)
    return found if dtype is None else with_dtype(found, dtype)


def with_dtype(captured: Capture, dtype: str) -> Capture:
    """The same model in another dtype; raises OptionError for an unknown one."""
    from fluxc.passes.set_dtype import SetDtype, torch_dtype

    name = str(torch_dtype(dtype)).removeprefix("torch.")
    program = SetDtype(name).apply(captured.program).program
    return Capture(program, {**captured.meta, "dtype": name}, captured.tokenizer_files)


def _from_path(model: str | Path, tokenizer: Any, progress: Progress) -> Capture:
    from fluxc.capture import sources

    path = Path(model)
    if path.is_file() and path.suffix in _PROGRAMS:
        return _from_program(path, tokenizer, progress)
    progress.start("finding the model")
    location = sources.locate(model)
    progress.start("loading weights")
    loaded = sources.load_model(location)
    progress.start("loading the tokenizer")
    tokenizer = tokenizer or sources.load_tokenizer(location, progress.note)
    return _capture_model(loaded, location.name, tokenizer, progress)


def _from_module(model: Any, tokenizer: Any, sample_inputs: tuple[Any, ...] | None, progress: Progress) -> Capture:
    from torch import nn
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return _capture_model(model, model.config.name_or_path or type(model).__name__, tokenizer, progress)
    if not isinstance(model, nn.Module):
        raise SourceError(f"a {type(model).__name__} is no model", hint="give a path, a hub id or an nn.Module")
    if sample_inputs is None:
        raise SourceError(
            f"{type(model).__name__} is no transformers model", hint="give sample_inputs=(input_ids, ...)"
        )
    from fluxc.capture.program import capture_module

    return capture_module(model, sample_inputs, tokenizer=tokenizer, progress=progress)


def _from_program(path: Path, tokenizer: Any, progress: Progress) -> Capture:
    from fluxc.archive import inspect_archive

    progress.start("reading the program")
    if inspect_archive(path).by_fluxc:
        return load_capture(path)
    from fluxc.capture.program import capture_file

    return capture_file(path, tokenizer=tokenizer, progress=progress)


def _capture_model(model: Any, name: str, tokenizer: Any, progress: Progress) -> Capture:
    from fluxc.capture.huggingface import capture_model

    progress.start("tracing and checking")
    program, check = capture_model(model)
    return Capture(program, _meta(model, name, check), files_of_tokenizer(tokenizer))


def _meta(model: Any, name: str, check: dict[str, Any]) -> dict[str, Any]:
    from fluxc.capture.huggingface import context_of
    from fluxc.capture.twin import model_dtype

    config = model.config
    return {
        "source": name,
        "family": config.model_type,
        "context": context_of(config),
        "vocab": model.get_output_embeddings().weight.shape[0],
        "layers": config.num_hidden_layers,
        "dtype": str(model_dtype(model)).removeprefix("torch."),
        "eos_ids": _eos_ids(model),
        "self_check": check,
        "versions": {name: importlib.metadata.version(name) for name in ("fluxc", "torch", "transformers")},
    }


def _eos_ids(model: Any) -> list[int]:
    """Token ids that end an answer, from the generation settings or else the config; may be empty."""
    settings: list[Any] = [getattr(model, "generation_config", None), model.config]
    found = [getattr(one, "eos_token_id", None) for one in settings]
    ids: Any = next((one for one in found if one is not None), [])
    return [int(ids)] if isinstance(ids, int) else [int(one) for one in ids]
