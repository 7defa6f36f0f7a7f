"""Every Triton kernel compiles for every architecture of the table, on a machine without a GPU."""

import dataclasses
import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fluxc.kernels import triton_config as config  # noqa: E402

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
POINTERS = {
    "*bf16": ("q", "k", "v", "out_ptr", "out", "grad", "dq", "dk", "dv", "cache"),
    "*fp32": ("lse", "lse_ptr", "delta", "parts", "sums", "scratch", "pooled", "sink_logits_ptr", "sink_logits"),
    "*i64": ("prompt_ptr", "start_ptr"),
    "*i32": ("counters", "counter_ptr", "table", "lens"),
    "*u8": ("route_ptr",),
    "fp32": ("scale",),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}
ROUTER = {f"{kind}{n}": "*fp32" for kind in "wb" for n in range(5)} | {"lens": "*i64", "out": "*fp32"}
ARCHS = [80, 89, 90, 100, 120]


def compiled(kernel, constants, arch, warps, stages=2, types=None, source=ASTSource, **options):
    """Compile with every argument aligned as torch allocates it; fails if the shared memory does not fit."""
    names = kernel.arg_names
    types = TYPES | (types or {})
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith(("_row", "_head", "_batch"))]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if signature[n] != "constexpr"}
    values = {(names.index(n),): value for n, value in constants.items()}
    made = source(kernel, signature, values, attributes)
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    found = triton.compile(made, target=GPUTarget("cuda", arch, 32), options=options)
    assert found.metadata.shared <= SHARED_BYTES[arch]
    assert found.asm["cubin"]
    return found


def attention_constants(width, **changed):
    flags = ("HAS_ROUTE", "HAS_PROMPT", "DECODE_FULL", "HAS_START", "SINK_LOGITS", "LSE")
    found = dict.fromkeys(("sink_logits_ptr", "route_ptr", "prompt_ptr", "start_ptr", "lse_ptr"))
    found |= dict.fromkeys(flags, False) | {"SOFTCAP": 0.0, "SPARSE": True, "D": width}
    return found | changed


def plain(width, arch, tiles):
    from fluxc.kernels.triton_forward import attention_forward

    tma = tiles.loader == "tma"
    sizes = {"DV": width, "WIDTH": width, "WIDTH_V": width, "BM": tiles.rows, "BN": tiles.keys, "TMA": tma}
    constants = attention_constants(width, **sizes, STAGES=tiles.stages, PRECISION="tf32")
    blocks = {"q": tiles.rows, "k": tiles.keys, "v": tiles.keys} if tma else {}
    types = {n: f"tensordesc<bf16[1, 1, {rows}, {width}]>" for n, rows in blocks.items()}
    return compiled(attention_forward, constants, arch, tiles.warps, tiles.stages, types)


PLAIN = [(arch, width) for (arch, width), tiles in config.TILES.items() if tiles.loader != "gluon"]


@pytest.mark.parametrize(
    ("arch", "width"), [pytest.param(*p, marks=() if p == (80, 64) else pytest.mark.slow) for p in PLAIN]
)
def test_attention(arch, width):
    plain(width, arch, config.TILES[arch, width])


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("table", ["PLAIN_TMA", "POINTER_90"])
def test_attention_on_hopper_without_gluon(width, table):
    plain(width, 90, getattr(config, table)[width])


@pytest.mark.parametrize("width", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (128, 256))])
def test_hopper_kernel(width):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from fluxc.kernels.triton_hopper import hopper_forward

    tiles = config.TILES[90, width]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    blocks = {"q": [1, 1, 64, width], "k": [1, 1, tiles.keys, width], "o": [1, 64, 1, width]}
    blocks["v"] = blocks["k"]
    types = {f"{n}_desc": f"tensordesc<bf16{block},{layout!r}>" for n, block in blocks.items()}
    constants = attention_constants(width, BN=tiles.keys, STAGES=tiles.stages, WAIT_LAST=tiles.wait_last)
    found = compiled(
        hopper_forward,
        constants,
        90,
        4,
        types=types,
        source=lambda fn, signature, values, attributes: GluonASTSource(fn, signature, values),
        maxnreg=168,
    )
    assert "wgmma.mma_async" in found.asm["ptx"]
    assert "cp.async.bulk.tensor" in found.asm["ptx"]


@pytest.mark.parametrize("width", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 256))])
def test_hopper_kernel_over_lists(width):
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from fluxc.kernels.triton_hopper_block import hopper_blocks

    tiles = config.BLOCKS_90[width]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    blocks = {"q": [1, 1, 64, width], "k": [1, 1, tiles.keys, width], "o": [1, 64, 1, width]}
    blocks["v"] = blocks["k"]
    types = {f"{n}_desc": f"tensordesc<bf16{block},{layout!r}>" for n, block in blocks.items()}
    constants = {"sink_logits_ptr": None, "D": width, "BLOCK": 128, "BN": tiles.keys, "STAGES": tiles.stages}
    constants |= {"WAIT_LAST": tiles.wait_last, "HEAD_MAJOR": True, "SINK_LOGITS": False, "SOFTCAP": 0.0}
    found = compiled(
        hopper_blocks,
        constants,
        90,
        4,
        types=types | {"index_ptr": "*i32", "count_ptr": "*i32"},
        source=lambda fn, signature, values, attributes: GluonASTSource(fn, signature, values),
        maxnreg=168,
    )
    assert "wgmma.mma_async" in found.asm["ptx"]
    assert "cp.async.bulk.tensor" in found.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "width"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128)])
def test_decode(width, kind, arch):
    from fluxc.kernels.triton_decode import decode_kernel

    tiles = config.decode_for(arch, width, kind == "fp32")
    constants = {"S2": 16, "DEEP": 4, "SIDE": 1, "W": tiles.warps, "G": 4, "G2": 4, "R": 8, "M": 16, "PAGE": 64}
    constants |= {"D": width, "WIDTH": width, "SOFTCAP": 0.0, "PRECISION": "tf32x3", "SINK_LOGITS": False}
    constants |= {"sink_logits": None, "DEPENDENT": tiles.dependent, "AHEAD": tiles.ahead}
    types = dict.fromkeys(("q", "cache", "out"), f"*{kind}")
    compiled(decode_kernel, constants, arch, tiles.warps, 2 * tiles.buffers + 1, types)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_full_precision(width, arch):
    from fluxc.kernels.triton_backward import dkv_kernel, dq_kernel
    from fluxc.kernels.triton_forward import attention_forward

    tiles, back = config.full_precision_for(arch, width), config.backward_full_precision_for(arch, width)
    fp32 = dict.fromkeys(("q", "k", "v", "out_ptr", "out", "grad", "dq", "dk", "dv"), "*fp32")
    sizes = {"DV": width, "WIDTH": width, "WIDTH_V": width, "BM": tiles.rows, "BN": tiles.keys, "TMA": False}
    constants = attention_constants(width, **sizes, STAGES=tiles.stages, PRECISION="tf32x3")
    compiled(attention_forward, constants, arch, tiles.warps, tiles.stages, fp32)
    constants = {"route_ptr": None, "prompt_ptr": None, "D": width, "WIDTH": width, "SPARSE": True}
    constants |= {"HAS_ROUTE": False, "HAS_PROMPT": False, "DECODE_FULL": False, "PRECISION": "tf32x3"}
    dq = {"BM": back.dq_rows, "BN": back.dq_keys, "STAGES": back.dq_stages}
    compiled(dq_kernel, constants | dq, arch, back.dq_warps, back.dq_stages, fp32)
    dkv = {"BM": back.dkv_rows, "BN": back.dkv_keys, "STAGES": back.dkv_stages}
    compiled(dkv_kernel, constants | dkv, arch, back.dkv_warps, back.dkv_stages, fp32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "width"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128)])
def test_append_and_write(width, kind, arch):
    from fluxc.kernels.triton_append import append_kernel, combine_kernel
    from fluxc.kernels.triton_kv import write_kernel

    tiles = config.append_for(0 if kind == "fp32" else arch, width)
    types = dict.fromkeys(("q", "k", "v", "out", "cache"), f"*{kind}")
    types |= dict.fromkeys(("starts", "sinks", "windows", "slots"), "*i64")
    constants = {"D": width, "WIDTH": width, "BM": tiles.rows, "BN": tiles.keys, "PAGE": 64, "SINK_LOGITS": False}
    constants |= {"SOFTCAP": 0.0, "PRECISION": "tf32x3", "sink_logits": None}
    for split in (False, True):
        how = {"GROUP": 4, "SPLIT": split}
        compiled(append_kernel, constants | how, arch, tiles.warps, tiles.stages, types)
    compiled(combine_kernel, {"D": width, "WIDTH": width, "BM": 16}, arch, 4, types=types)
    compiled(write_kernel, {"D": width, "WIDTH": width, "HEADS": 8, "PAGE": 64}, arch, 4, types=types)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "width"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 128)])
def test_blocks(width, kind, arch):
    from fluxc.kernels.triton_block import block_kernel
    from fluxc.kernels.triton_scores import keep_kernel, parts_kernel

    tiles = config.full_precision_for(arch, width) if kind == "fp32" else config.tiles_for(arch, width)
    tiles = config.PLAIN_TMA[width] if tiles.loader == "gluon" else tiles
    tma, m, n = tiles.loader == "tma", min(128, tiles.rows), min(128, tiles.keys)
    types = dict.fromkeys(("q", "k", "v", "out_ptr"), f"*{kind}") | dict.fromkeys(("index_ptr", "count_ptr"), "*i32")
    types |= {x: f"tensordesc<bf16[1, 1, {r}, {width}]>" for x, r in (("q", m), ("k", n), ("v", n))} if tma else {}
    constants = {"D": width, "DV": width, "WIDTH": width, "WIDTH_V": width, "BLOCK": 128, "BM": m, "BN": n, "TMA": tma}
    constants |= {"SINK_LOGITS": False, "SOFTCAP": 0.0, "sink_logits_ptr": None, "STAGES": tiles.stages}
    constants |= {"PRECISION": "tf32x3"}
    compiled(block_kernel, constants, arch, tiles.warps, tiles.stages, types)
    types = {"q": f"*{kind}", "k": f"*{kind}"} | SCORES
    tiles = config.scores_for(arch, width * (8 if kind == "fp32" else 2))
    compiled(parts_kernel, scores_constants(tiles, width), arch, tiles.warps, tiles.stages, types)
    compiled(keep_kernel, {"PER": 8, "BN": tiles.keys, "PADDED": 1024}, arch, 4, types=types)


SCORES = {"parts": "*fp32", "tops": "*fp32", "index": "*i32", "count": "*i32", "threshold": "fp32"}


def scores_constants(tiles, width, stride=16):
    sizes = {"BM": tiles.rows, "BN": tiles.keys, "BK": min(tiles.depth or width, width), "TMA": tiles.tma}
    return sizes | {"D": width, "WIDTH": width, "STRIDE": stride, "PER": 8, "PRECISION": "tf32x3"}


@pytest.mark.parametrize("width", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 256))])
@pytest.mark.parametrize("stride", [16, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_scores_on_hopper(width, stride, tma):
    """Both operands of the product come from shared memory as TMA wrote them, and no register spills."""
    from fluxc.kernels.triton_scores import parts_kernel

    tiles = dataclasses.replace(config.SCORES_90, tma=tma)
    depth = min(tiles.depth, width)
    blocks = {"q": tiles.rows, "k": tiles.keys}
    types = {n: f"tensordesc<bf16[1, 1, 1, {rows}, {depth}]>" if tma else "*bf16" for n, rows in blocks.items()}
    constants = scores_constants(tiles, width, stride)
    found = compiled(parts_kernel, constants, 90, tiles.warps, tiles.stages, types | SCORES)
    assert "wgmma.mma_async" in found.asm["ptx"]
    if tma:
        assert "cp.async.bulk.tensor.5d" in found.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_router(arch):
    from fluxc.kernels.triton_router import pool_kernel, router_kernel

    tiles = config.router_for(arch)
    shared = {"DEPENDENT": tiles.dependent, "D": 128, "WIDTH": 128}
    pool = {"LAST_ADDS": False, "PARTS": tiles.pool_parts, "ROWS": tiles.rows, "out": None}
    compiled(pool_kernel, shared | pool, arch, tiles.pool_warps, types=ROUTER)
    rest = {"PHASE": -1, "PARTS": tiles.parts, "POOL_PARTS": tiles.pool_parts}
    rest |= {"E": 1024 // tiles.parts, "T": 512 // tiles.parts}
    compiled(router_kernel, shared | rest, arch, tiles.warps, types=ROUTER)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_gradients(width, arch):
    from fluxc.kernels.triton_backward import dkv_kernel, dq_kernel

    tiles = config.backward_for(arch, width)
    constants = {"route_ptr": None, "prompt_ptr": None, "D": width, "WIDTH": width, "SPARSE": True}
    constants |= {"HAS_ROUTE": False, "HAS_PROMPT": False, "DECODE_FULL": False, "PRECISION": "tf32"}
    dq = {"BM": tiles.dq_rows, "BN": tiles.dq_keys, "STAGES": tiles.dq_stages}
    compiled(dq_kernel, constants | dq, arch, tiles.dq_warps, tiles.dq_stages)
    dkv = {"BM": tiles.dkv_rows, "BN": tiles.dkv_keys, "STAGES": tiles.dkv_stages}
    compiled(dkv_kernel, constants | dkv, arch, tiles.dkv_warps, tiles.dkv_stages)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_fused(arch):
    from fluxc.kernels.triton_fused import norm_kernel, swiglu_kernel
    from fluxc.kernels.triton_qkv import qkv_kernel

    bf16 = ("x", "residual", "weight", "normed", "total", "gate", "up", "q_weight", "k_weight", "cos", "sin", "q_out")
    types = dict.fromkeys((*bf16, "k_out"), "*bf16") | {"slots": "*i64", "lens": "*i64", "eps": "fp32"}
    types["sums"] = "*fp32"
    compiled(norm_kernel, {"W": 4096, "WIDTH": 4096}, arch, 8, types=types)
    compiled(swiglu_kernel, {"BLOCK": 1024}, arch, 4, types=types)
    constants = {"D": 128, "WIDTH": 128, "R": 128, "BM": 32, "PAGE": 64, "Q_NORM": True, "K_NORM": True}
    for parts in (0, 5):  # without a pool and with one
        compiled(qkv_kernel, constants | {"PARTS": parts}, arch, 4, types=types)
