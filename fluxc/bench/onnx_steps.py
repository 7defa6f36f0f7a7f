"""Parts of the ONNX benchmark, each run in a process of its own: `python -m fluxc.bench.onnx_steps STEP JSON`.

A part prints one line of JSON. Peaks are the largest resident set of the process, in bytes.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
"""Sizes of a SmolLM2-135M layer."""
VOCABULARY = 49_152
Result = dict[str, Any]


class Phases:
    """A progress bar that notes when each phase began."""

    def __init__(self) -> None:
        self.began: list[tuple[str, float]] = []

    def start(self, name: str, total: int | None = None) -> None:
        """Note the phase."""
        self.began.append((name, time.perf_counter()))

    def advance(self, count: int = 1) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def seconds(self) -> dict[str, float]:
        """Of each phase, up to now."""
        ends = [at for _, at in self.began[1:]] + [time.perf_counter()]
        return {name: round(end - at, 2) for (name, at), end in zip(self.began, ends, strict=True)}


def export(model: str, place: str, verify: bool) -> Result:
    """`fluxc export --target onnx`: seconds of each phase, CPU seconds, peak, sizes, what was verified."""
    import fluxc

    phases, cpu = Phases(), time.process_time()
    report = fluxc.export(model, target="onnx", output=place, verify=verify, force=True, progress=phases).report
    return {
        "seconds": phases.seconds(),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_bytes": _peak(),
        "weight_bytes": report["weight_bytes"],
        "engine_bytes": report["bytes"],
        "verified": report["verified"],
    }


def random_model(layers: int, place: str) -> Result:
    """A model.flux of `layers` layers as wide as SmolLM2's, with random weights."""
    from fluxc.capture.api import capture
    from fluxc.tiny_models import build
    from fluxc.toy_flux import flux_of

    source = build("llama", num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=True, **WIDTH)
    found = capture(source)
    flux_of(Path(place), found.program, found.meta)
    return {"layers": layers}


def dense(model: str, place: str) -> Result:
    """Plain `torch.onnx.export` of the transformers model with its SDPA attention; logits of the last row alone."""
    import torch

    from fluxc.capture.sources import load_model, locate

    source = load_model(locate(model)).eval()
    source.set_attn_implementation("sdpa")

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source = source

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.source(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits

    started = time.perf_counter()
    length = torch.export.Dim("S", min=2, max=65_536)
    torch.onnx.export(
        Last(),
        (torch.zeros(1, 64, dtype=torch.int64),),
        place,
        dynamo=True,
        dynamic_shapes=({1: length},),
        verbose=False,
    )
    return {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": _peak()}


def prefill(engine: str, dense: str, length: int, rounds: int, threads: int) -> Result:
    """Seconds of a prefill of `length` tokens: the engine with all layers full and all sparse, and the dense model."""
    import numpy as np
    import onnxruntime

    from fluxc.exporters.engine_dir import open_engine
    from fluxc.exporters.onnx_sessions import OnnxSessions

    made = open_engine(engine)
    sessions = OnnxSessions(made.path, {name: each["file"] for name, each in made.manifest.programs.items()}, threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    plain = onnxruntime.InferenceSession(dense, options, providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, made.manifest.vocabulary, (1, length))
    rows, at, routable = np.array([length]), np.array([[length - 1]]), len(made.plan.layers)

    def routed(bias: float) -> np.ndarray:
        forced = np.full((routable, 1), bias, np.float32)
        return sessions.prefill(ids, rows, forced, at)["logits"]

    name = plain.get_inputs()[0].name
    runs: dict[str, Callable[[], np.ndarray]] = {
        "dense": lambda: plain.run(None, {name: ids})[0],
        "full": lambda: routed(np.inf),
        "sparse": lambda: routed(-np.inf),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    logits: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for kind, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            logits[kind] = run()[0, -1]
            times[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
        error = float(np.abs(logits["dense"] - logits["full"]).max())
        if not error < 1e-2:
            raise SystemExit(f"all-full and the dense export differ by {error:.1e}: nothing is reported")
    found = {kind: _medians(values) for kind, values in times.items()}
    full, sparse, plainly = (found[kind]["cpu_seconds"] for kind in ("full", "sparse", "dense"))
    ratios = {"full_over_sparse": round(full / sparse, 3), "dense_over_full": round(plainly / full, 3)}
    return {"length": length, "threads": threads, "max_difference": error, **found, **ratios, "peak_bytes": _peak()}


def first_token(engine: str, length: int) -> Result:
    """One token after a prompt of `length` tokens; the caller takes the time from the start of the process."""
    import fluxc

    with fluxc.load(engine) as loaded:
        loaded.generate(list(range(100, 100 + length)), max_new_tokens=1)
    return {"torch": "torch" in sys.modules, "transformers": "transformers" in sys.modules}


def memory(engine: str) -> Result:
    """Bytes of this process before an engine is loaded and once it ran; pages that are mapped twice count once."""
    import numpy  # noqa: F401
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    import fluxc
    from fluxc.engine import load  # noqa: F401

    before = _proportional()
    with fluxc.load(engine, kv_memory=64_000_000, max_batch=1) as loaded:
        loaded.generate([5, 6, 7], max_new_tokens=3, eos_token_id=[])
        loaded.generate([5, 6, 7], max_new_tokens=3, eos_token_id=[])
        after = _proportional()
    return {"before_bytes": before, "after_bytes": after}


def text(model: str, engine: str, tokens: int) -> Result:
    """Greedy tokens of the model.flux and of the engine for short and long prompts, routes forced and chosen."""
    import fluxc

    words = "The river town kept its records in a ledger, and the keeper of the ledger wrote one line every day. "
    prompts = ["What is the capital of France?", words * 120 + "In the end the keeper"]
    asked: list[dict[str, Any]] = [{}, {"budget": 1.0}, {"budget": 0.0}]
    found: dict[str, list[list[int]]] = {}
    for name, path in (("flux", model), ("onnx", engine)):
        with fluxc.load(path, "cpu") as loaded:
            found[name] = [
                list(loaded.generate(prompt, max_new_tokens=tokens, eos_token_id=[], **options).tokens)
                for prompt in prompts
                for options in asked
            ]
    equal = [ours == theirs for ours, theirs in zip(found["onnx"], found["flux"], strict=True)]
    return {"answers": len(equal), "tokens": tokens, "equal": sum(equal)}


def _medians(values: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
    return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _proportional() -> int:
    """Proportional set size of this process in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024


STEPS: dict[str, Callable[..., Result]] = {
    step.__name__: step for step in (export, random_model, dense, prefill, first_token, memory, text)
}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(STEPS[sys.argv[1]](**json.loads(sys.argv[2]))) + "\n")
