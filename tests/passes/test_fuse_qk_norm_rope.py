"""Pass fuse-qk-norm-rope: norms, RoPE, the KV write and the pool of each layer in one op, the same values, and why not.

On a machine with a GPU the programs run there too, by the Triton kernels, under CUDA graphs.
"""

from __future__ import annotations

import collections
import functools

import pytest
import torch

from fluxc import kernels, passes
from fluxc.capture.api import capture
from fluxc.engine.traced import TracedPrograms
from fluxc.ir.graph import argument, calls
from fluxc.ir.printer import program_diff
from fluxc.ir.verifier import problems
from fluxc.kernels.add_rms_norm import triton_impl as norm_impl
from fluxc.kernels.qk_norm_rope_cache import triton_impl as heads_impl
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.swiglu import triton_impl as swiglu_impl
from fluxc.passes.expose_kv import ExposeKV
from fluxc.passes.fuse_qk_norm_rope import FuseQkNormRope
from fluxc.passes.merge_linears import MergeLinears
from fluxc.passes.place import Place
from fluxc.passes.set_dtype import SetDtype
from fluxc.testing import TINY_FAMILIES, ToyConfig
from fluxc.toy_flux import toy_routed as routed_of

kernels.register()
fused = torch.ops.fluxc.qk_norm_rope_cache
ONE = ToyConfig(windows=(0,), qk_norm=True)
# GPT-OSS rotates halves of its own, Cohere pairs, SmolLM3 leaves every second layer without RoPE.
COUNTS = {"llama": 2, "qwen3": 2, "phi3": 2, "gemma2": 2, "gpt-neox": 2, "smollm3": 1, "gpt-oss": 0, "cohere2": 0}
SLOW = {"smollm3", "gpt-oss", "cohere2"}
ALL = [pytest.param(name, "decode", marks=[pytest.mark.slow] if name in SLOW else []) for name in COUNTS]
PIPELINES = {"prefill": passes.prefill_pipeline, "decode": passes.decode_pipeline, "append": passes.append_pipeline}
CASES = [("llama", "float32"), ("qwen3", "bfloat16"), ("gemma2", "float32"), ("phi3", "bfloat16")]
MORE = [("llama", "bfloat16"), ("qwen3", "float32"), ("gemma2", "bfloat16"), ("phi3", "float32")]
RUNS = [
    *((*case, "cpu") for case in CASES),
    *(pytest.param(*case, "cpu", marks=[pytest.mark.slow]) for case in MORE),
    *(pytest.param(*case, "cuda", marks=[pytest.mark.gpu]) for case in (*CASES, *MORE)),
]
# Rounding of the model's dtype at another place: q and k turn in fp32 on a GPU, and pools sum in another order.
CLOSE = {"float32": {"rtol": 1e-3, "atol": 1e-3}, "bfloat16": {"rtol": 5e-2, "atol": 5e-2}}


@functools.cache
def routed(name, dtype="float32", device="cpu"):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    program = capture(TINY_FAMILIES[name]()).program
    program = program if dtype == "float32" else SetDtype(dtype).apply(program).program
    program = program if device == "cpu" else Place(device).apply(program).program
    return MergeLinears().apply(routed_of(program)).program


def fuse(program, phase):
    return PIPELINES[phase](fuse=True).run(program, "routed").program


@pytest.mark.parametrize("phase", PIPELINES)
def test_golden(toy_routed, golden, phase):
    plain = PIPELINES[phase]().run(toy_routed(ONE), "routed").program
    golden.check(phase, program_diff(plain, FuseQkNormRope().apply(plain).program))


# All phases of two families, and what each rotation comes to in one phase.
@pytest.mark.parametrize(("name", "phase"), [("llama", "prefill"), ("qwen3", "prefill"), ("qwen3", "append"), *ALL])
def test_families(name, phase):
    made = fuse(routed(name), phase)
    ops = calls(made, fused)
    assert len(ops) == COUNTS[name]
    norms = name == "qwen3"
    assert all((argument(op, "q_weight") is not None) == norms for op in ops)
    writes = len(calls(made, torch.ops.fluxc.kv_write))
    assert writes == {"prefill": 0, "decode": 2 - COUNTS[name], "append": 2}[phase]
    assert {str(argument(op, "cache")) == "cache" for op in ops} <= {phase == "decode"}
    assert problems(made, phase) == []
    assert FuseQkNormRope().apply(made).count == 0


def test_the_pool_comes_out_of_the_op():
    made = fuse(routed("qwen3"), "prefill")
    assert calls(made, torch.ops.fluxc.router_pool) == []
    assert [argument(op, "pool") for op in calls(made, fused)] == [8, 8]
    dense = passes.prefill_pipeline(dense=True, fuse=True).run(routed("qwen3"), "routed").program
    assert [argument(op, "pool") for op in calls(dense, fused)] == [0, 0]


@pytest.mark.parametrize(("rope", "count"), [("partial", 2), ("interleaved", 0), ("scaled", 0), ("none", 0)])
def test_rotations(toy_routed, rope, count):
    result = FuseQkNormRope().apply(ExposeKV().apply(toy_routed(ToyConfig(rope=rope))).program)
    assert result.count == count
    if not count:
        assert {note.reason for note in result.notes} == {"no rotate-half RoPE in front of it"}


def test_a_write_by_nobody_is_found(toy_routed):
    made = fuse(toy_routed(ONE), "decode")
    (op,) = calls(made, fused)
    op.args = tuple(made.graph_module.graph.find_nodes(op="placeholder")[0] if a is op.args[7] else a for a in op.args)
    assert "1 attentions, 0 writes" in problems(made, "decode")[0]


def _pair(name, dtype, device):
    return [TracedPrograms(routed(name, dtype, device), fuse=how) for how in (False, True)]


def _check(found, wanted, dtype, device):
    if device == "cpu":
        assert torch.equal(found, wanted), "the op's CPU implementation is the same arithmetic"
    assert torch.isfinite(wanted).all()
    torch.testing.assert_close(found, wanted, **CLOSE[dtype])


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
def test_prefill_gives_the_same(name, dtype, device):
    plain, mine = _pair(name, dtype, device)
    ids = torch.arange(40, device=device)[None] % 97
    layers = sum(layer.routable for layer in plain.layers)
    bias = torch.tensor([torch.inf, -torch.inf] * layers)[:layers, None].to(device)
    args = (ids, torch.tensor([40], device=device), bias, torch.arange(40, device=device)[None])
    for dense in (False, True):
        *kept, end = mine.prefill(*args, dense=dense)
        *kept_plain, end_plain = plain.prefill(*args, dense=dense)
        _check(end.logits, end_plain.logits, dtype, device)
        for one, other in zip(kept, kept_plain, strict=True):
            _check(one.k, other.k, dtype, device)
            assert torch.equal(one.v, other.v) or device == "cuda"


def _steps(programs, device, run):
    """Logits of 5 steps of two requests from an empty cache, each layer on pages of its own; `run` makes the caller."""
    layers = programs.layers
    count, shape = len(layers), layers[0]
    cache = torch.zeros(2 * count, 2, shape.kv_heads, PAGE, shape.head_dim, dtype=programs.dtype, device=device)
    page = torch.arange(2 * count, device=device).view(count, 2)
    call = run(programs, cache)
    logits = []
    for step in range(5):
        ids = torch.tensor([[3 + step], [50 + 2 * step]], device=device)
        position = torch.full((2, 1), step, device=device)
        slots = page * PAGE + step
        lens = torch.full((count, 2), step + 1, dtype=torch.int32, device=device)
        logits.append(call(ids, position, slots, page[:, :, None].int(), lens).clone())
    return torch.stack(logits), cache


def _eager(programs, cache):
    return lambda *args: programs.decode(cache, *args)


def _recorded(programs, cache):
    """Steps replayed from one CUDA graph, recorded with inputs that write nowhere."""
    held = []

    def call(*args):
        if not held:
            inputs = [x.clone() for x in args]
            inputs[2].fill_(-1)
            for _ in range(2):
                programs.decode(cache, *inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = programs.decode(cache, *inputs)
            held.extend((graph, inputs, out))
        graph, inputs, out = held
        for kept, x in zip(inputs, args, strict=True):
            kept.copy_(x)
        graph.replay()
        return out

    return call


@pytest.mark.parametrize(("name", "dtype", "device"), RUNS)
def test_decode_gives_the_same(name, dtype, device):
    plain, mine = _pair(name, dtype, device)
    wanted, cache = _steps(plain, device, _eager)
    found, written = _steps(mine, device, _recorded if device == "cuda" else _eager)
    _check(found, wanted, dtype, device)
    _check(written, cache, dtype, device)
    assert cache[:, :, :, :5].abs().sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", CLOSE)
def test_triton_serves_the_fused_ops(dtype):
    """By every fused op of five decode steps; fused is what an engine on a GPU runs unless told otherwise."""
    program = routed("qwen3", dtype, "cuda")
    seen = collections.Counter()
    with pytest.MonkeyPatch.context() as patch:
        for impl in (heads_impl, norm_impl, swiglu_impl):
            patch.setattr(impl, "forward", _counted(impl.__name__, impl.forward, seen))
        _steps(TracedPrograms(program), "cuda", _eager)
    assert sorted(seen.values()) == [5 * 2, 5 * 2, 5 * 4]


def _counted(name, forward, seen):
    def call(*args, **how):
        seen[name] += 1
        return forward(*args, **how)

    return call
