"""Attention forward for Hopper (sm_90) in Gluon: one TMA producer warp and two warpgroups of 64 query rows each.

Every CTA stays resident and draws work items (128 query rows of one head) from a counter, longest first. The producer
runs ahead through the key tiles of the item (triton_tiles.py) and into the next item. Each warpgroup overlaps the
softmax of one key tile with the value product of the tile before; the other warpgroup fills what is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fluxc.kernels.triton_tiles import COUNTS, gluon_dense_rows, gluon_masked_tile, gluon_tile_ranges, gluon_whole_tile

# Renamed after Triton 3.6.
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
ROWS = gl.constexpr(64)  # query rows of a warpgroup
LOG2E = gl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """Scalars of a launch. `group`: query heads of a key head; `tiles`: items of a head; `items`: work items in all."""

    heads: Any
    group: Any
    batch_heads: Any
    rows: Any
    keys: Any
    tiles: Any
    items: Any
    sink: Any
    window: Any
    last: Any


class Inputs(NamedTuple):
    """Optional tensors of a launch: bytes[B], i64[B], i64[B], [H]; and the log-sum-exp to write, fp32 [B,H,S]."""

    route: Any
    prompt: Any
    start: Any
    sink_logits: Any
    lse: Any


class Memory(NamedTuple):
    """TMA descriptors and the shared-memory buffers they fill: q and out per warpgroup, k and v in rings."""

    q_desc: Any
    k_desc: Any
    v_desc: Any
    o_desc: Any
    q: Any
    k: Any
    v: Any
    o: Any
    item: Any


class Barriers(NamedTuple):
    """`full`: the producer wrote; `free`: the readers are done."""

    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    item_full: Any
    item_free: Any


class Ranges(NamedTuple):
    """The key tiles of a work item (triton_tiles.py)."""

    head: Any
    edge: Any
    body: Any
    diag: Any
    end: Any
    masked: Any
    visits: Any


@gluon.constexpr_function
def _accumulator(columns):
    """Register layout of a [64, columns] fp32 accumulator of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _work_item(item, sizes):
    """Batch, head and first row of a work item. The last rows see most keys: they come first."""
    tile = sizes.tiles - 1 - item // sizes.batch_heads
    rest = item % sizes.batch_heads
    return rest // sizes.heads, rest % sizes.heads, tile * (2 * ROWS)


@gluon.jit
def _visits(b, row, sizes, inputs, BN: gl.constexpr, FLAGS: gl.constexpr):
    """Key tiles of the 128 rows from `row` on, the dense rows of sample b, and the position of its row 0."""
    first, stop = gluon_dense_rows(b, inputs.route, inputs.prompt, sizes.last, FLAGS[0], FLAGS[1], FLAGS[2])
    start = b * 0
    if FLAGS[3]:
        start = gl.load(inputs.start + b).to(gl.int32)
    high = start + min(row + 2 * ROWS, sizes.rows) - 1
    head, n_sink, edge, body, diag, end = gluon_tile_ranges(start + row, high, sizes.keys, sizes.sink, sizes.window,
                                                            first, stop, BN)  # fmt: skip
    masked = (end - diag) + (body - edge) + n_sink
    return Ranges(head, edge, body, diag, end, masked, masked + (diag - body) + head), first, stop, start


@gluon.jit
def _tile(step, ranges):
    tile = gluon_masked_tile(step, ranges.head, ranges.edge, ranges.body, ranges.diag, ranges.end)
    if step >= ranges.masked:
        tile = gluon_whole_tile(step - ranges.masked, ranges.body, ranges.diag)
    return tile


@gluon.jit
def _load(desc, b, head, row, ready, buffer):
    mbarrier.expect(ready, desc.block_type.nbytes)
    copy_in(desc, [b, head, row, 0], ready, buffer)


@gluon.jit
def _load_value(memory, bars, b, head, row, n, STAGES: gl.constexpr):
    stage = n % STAGES
    mbarrier.wait(bars.v_free.index(stage), ((n // STAGES) & 1) ^ 1)
    _load(memory.v_desc, b, head, row, bars.v_full.index(stage), memory.v.index(stage))


@gluon.jit
def _announce(item, turn, memory, bars):
    """Tell both warpgroups which item comes next."""
    slot = turn & 1
    mbarrier.wait(bars.item_free.index(slot), ((turn >> 1) & 1) ^ 1)
    memory.item.index(slot).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(bars.item_full.index(slot), count=1)


@gluon.jit
def _next_item(turn, memory, bars):
    slot = turn & 1
    mbarrier.wait(bars.item_full.index(slot), (turn >> 1) & 1)
    item = gl.max(memory.item.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)
    mbarrier.arrive(bars.item_free.index(slot), count=1)
    return item


@gluon.jit
def _producer(memory, bars, sizes, inputs, counter_ptr, BN: gl.constexpr, STAGES: gl.constexpr,
              FLAGS: gl.constexpr):  # fmt: skip
    """Draw work items, and keep the key and value rings full."""
    item = gl.program_id(0)
    turn = 0
    n = 0
    while item < sizes.items:
        _announce(item, turn, memory, bars)
        b, h, row = _work_item(item, sizes)
        hk = h // sizes.group
        ranges, _first, _stop, _start = _visits(b, row, sizes, inputs, BN, FLAGS)
        before = 0
        for step in range(ranges.visits):
            tile = _tile(step, ranges)
            stage = n % STAGES
            mbarrier.wait(bars.k_free.index(stage), ((n // STAGES) & 1) ^ 1)
            _load(memory.k_desc, b, hk, tile * BN, bars.k_full.index(stage), memory.k.index(stage))
            if step == 0:
                for wg in gl.static_range(2):
                    mbarrier.wait(bars.q_free.index(wg), (turn & 1) ^ 1)
                    _load(memory.q_desc, b, h, row + wg * ROWS, bars.q_full.index(wg), memory.q.index(wg))
            else:
                _load_value(memory, bars, b, hk, before * BN, n - 1, STAGES)
            before = tile
            n += 1
        _load_value(memory, bars, b, hk, before * BN, n - 1, STAGES)
        turn += 1
        item = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
    _announce(sizes.items, turn, memory, bars)


@gluon.jit
def _softmax(s, m, scale, tile, lower, upper, sink, MASKED: gl.constexpr, SPARSE: gl.constexpr,
             SOFTCAP: gl.constexpr):  # fmt: skip
    """exp2 of one key tile's scores against the new running maximum; the maximum; the factor for what came before."""
    BN: gl.constexpr = s.shape[1]
    factor = scale
    if SOFTCAP != 0.0:
        e = gl.exp2(s * (scale * (2.0 / SOFTCAP)))
        s = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (e + 1.0))
        factor = 1.0
    if MASKED:
        col = gl.expand_dims(gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout)), 0)
        s = gl.where(col <= gl.expand_dims(upper - tile * BN, 1), s, float("-inf"))
        if SPARSE:
            seen = (col >= gl.expand_dims(lower - tile * BN, 1)) | (col < sink - tile * BN)
            s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=1) * factor)
    shift = m_new
    if MASKED:
        shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    return gl.exp2(s * factor - gl.expand_dims(shift, 1)), m_new, gl.exp2(m - shift)


@gluon.jit
def _operand(p, dtype: gl.constexpr, D: gl.constexpr):
    """Probabilities as the register operand of the value product."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, _accumulator(D), 2), assert_trivial=True)


@gluon.jit
def _output_rows(x, D: gl.constexpr):
    """Per-row values of the scores, broadcastable against the output accumulator."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, _accumulator(D)), assert_trivial=True), 1)


@gluon.jit
def _scores(q, k_buf, stage, D: gl.constexpr):
    """Start q @ k^T of the key tile in `stage`."""
    BN: gl.constexpr = k_buf.shape[3]
    zero = gl.zeros([ROWS, BN], gl.float32, _accumulator(BN))
    k = k_buf.index(stage).reshape([BN, D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _values(p, acc, v_buf, stage, D: gl.constexpr):
    """Start acc + p @ v of the value tile in `stage`."""
    BN: gl.constexpr = v_buf.shape[3]
    return warpgroup_mma(p, v_buf.index(stage).reshape([BN, D]), acc, is_async=True)


@gluon.jit
def _step(acc, p, m, total, n, tile, more, q, lower, upper, sink, scale, memory, bars, MASKED: gl.constexpr,
          SPARSE: gl.constexpr, SOFTCAP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
          WAIT_LAST: gl.constexpr):  # fmt: skip
    """Key tile n, already loaded: its scores and softmax, beside the value product of key tile n - 1.

    WAIT_LAST puts the wait for key tile n + 1 before the wait for the value product. It ends the basic block; else
    ptxas moves that second wait up to the first, ahead of the exponentials.
    """
    stage = n % STAGES
    v_stage = (n - 1) % STAGES
    s_pending = _scores(q, memory.k, stage, D)
    mbarrier.wait(bars.v_full.index(v_stage), ((n - 1) // STAGES) & 1)
    acc_pending = _values(p, acc, memory.v, v_stage, D)
    s = warpgroup_mma_wait(1, [s_pending])
    mbarrier.arrive(bars.k_free.index(stage), count=1)
    p32, m, alpha = _softmax(s, m, scale, tile, lower, upper, sink, MASKED, SPARSE, SOFTCAP)
    total = total * alpha + gl.sum(p32, axis=1)
    p_next = _operand(p32, p.dtype, D)
    if WAIT_LAST:
        mbarrier.wait(bars.k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=more)
    acc, p, p_next = warpgroup_mma_wait(0, [acc_pending, p, p_next])
    mbarrier.arrive(bars.v_free.index(v_stage), count=1)
    if not WAIT_LAST:
        mbarrier.wait(bars.k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=more)
    return acc * _output_rows(alpha, D), p_next, m, total


@gluon.jit
def _consumer(memory, bars, sizes, inputs, scale, WG: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
              STAGES: gl.constexpr, WAIT_LAST: gl.constexpr, SPARSE: gl.constexpr, SOFTCAP: gl.constexpr,
              FLAGS: gl.constexpr):  # fmt: skip
    """One warpgroup: 64 query rows of each work item."""
    ROW: gl.constexpr = gl.SliceLayout(1, _accumulator(BN))
    dtype: gl.constexpr = memory.o_desc.dtype
    q = memory.q.index(WG).reshape([ROWS, D])
    # Heads of 256 leave no room for a buffer of their own: the output takes the queries' place.
    SHARED: gl.constexpr = memory.o is None
    out = q if SHARED else memory.o.index(WG).reshape([ROWS, D])
    turn = 0
    n = 0
    item = _next_item(turn, memory, bars)
    while item < sizes.items:
        b, h, row = _work_item(item, sizes)
        ranges, first, stop, start = _visits(b, row, sizes, inputs, BN, FLAGS)
        r = row + WG * ROWS + gl.arange(0, ROWS, layout=ROW)
        i = start + r
        lower = gl.where((i >= first) & (i < stop), 0, i - sizes.window + 1)
        upper = gl.minimum(i, sizes.keys - 1)
        m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        total = gl.zeros([ROWS], gl.float32, ROW)
        if FLAGS[4]:
            m = gl.full([ROWS], gl.load(inputs.sink_logits + h).to(gl.float32) * LOG2E, gl.float32, ROW)
            total = total + 1.0

        stage = n % STAGES
        mbarrier.wait(bars.q_full.index(WG), turn & 1)
        mbarrier.wait(bars.k_full.index(stage), (n // STAGES) & 1)
        s = warpgroup_mma_wait(0, [_scores(q, memory.k, stage, D)])
        mbarrier.arrive(bars.k_free.index(stage), count=1)
        p32, m, alpha = _softmax(s, m, scale, _tile(0, ranges), lower, upper, sizes.sink, True, SPARSE, SOFTCAP)
        total = total * alpha + gl.sum(p32, axis=1)
        p = _operand(p32, dtype, D)
        acc = gl.zeros([ROWS, D], gl.float32, _accumulator(D))
        n += 1
        mbarrier.wait(bars.k_full.index(n % STAGES), (n // STAGES) & 1, pred=ranges.visits > 1)
        for step in range(1, ranges.masked):
            acc, p, m, total = _step(acc, p, m, total, n, _tile(step, ranges), step + 1 < ranges.visits, q, lower,
                                     upper, sizes.sink, scale, memory, bars, True, SPARSE, SOFTCAP, D,
                                     STAGES, WAIT_LAST)  # fmt: skip
            n += 1
        for step in range(max(ranges.masked, 1), ranges.visits):
            acc, p, m, total = _step(acc, p, m, total, n, 0, step + 1 < ranges.visits, q, lower, upper, sizes.sink,
                                     scale, memory, bars, False, SPARSE, SOFTCAP, D, STAGES, WAIT_LAST)  # fmt: skip
            n += 1
        if not SHARED:
            mbarrier.arrive(bars.q_free.index(WG), count=1)
        v_stage = (n - 1) % STAGES
        mbarrier.wait(bars.v_full.index(v_stage), ((n - 1) // STAGES) & 1)
        acc = warpgroup_mma_wait(0, [_values(p, acc, memory.v, v_stage, D)])
        mbarrier.arrive(bars.v_free.index(v_stage), count=1)

        total = gl.where(total == 0.0, 1.0, total)
        if FLAGS[5]:
            lse = inputs.lse + (b * sizes.heads + h).to(gl.int64) * sizes.rows
            gl.store(lse + r, m / LOG2E + gl.log(total), mask=r < sizes.rows)
        tma.store_wait(0)
        out.store((acc * _output_rows(1.0 / total, D)).to(dtype))
        fence_async_shared()
        copy_out(memory.o_desc, [b, row + WG * ROWS, h, 0], out.reshape([1, ROWS, 1, D]))
        if SHARED:
            tma.store_wait(0)
            mbarrier.arrive(bars.q_free.index(WG), count=1)
        turn += 1
        item = _next_item(turn, memory, bars)
    tma.store_wait(0)


@gluon.jit
def _barriers(n: gl.constexpr, arrivals: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(n):
        mbarrier.init(bars.index(x), count=arrivals)
    return bars


@gluon.jit(do_not_specialize=(*COUNTS, "n_items"))
def hopper_forward(q_desc, k_desc, v_desc, o_desc, sink_logits_ptr, route_ptr, prompt_ptr, start_ptr, lse_ptr,
                   counter_ptr, scale, heads, group, batch_heads, rows, keys, n_tiles, n_items, sink, window, last,
                   D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WAIT_LAST: gl.constexpr,
                   SPARSE: gl.constexpr, HAS_ROUTE: gl.constexpr, HAS_PROMPT: gl.constexpr, DECODE_FULL: gl.constexpr,
                   HAS_START: gl.constexpr, SINK_LOGITS: gl.constexpr, LSE: gl.constexpr,
                   SOFTCAP: gl.constexpr):  # fmt: skip
    """q [B,H,S,D], k, v [B,Hk,T,D] -> o [B,S,H,D] through TMA descriptors; `scale` includes log2(e)."""
    o_buf: gl.constexpr = None
    if D < 256:
        o_buf = gl.allocate_shared_memory(o_desc.dtype, [2, 1, ROWS, 1, D], o_desc.layout)
    memory = Memory(
        q_desc,
        k_desc,
        v_desc,
        o_desc,
        gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BN, D], v_desc.layout),
        o_buf,
        gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    bars = Barriers(_barriers(2, 1), _barriers(2, 1), _barriers(STAGES, 1), _barriers(STAGES, 2),
                    _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(2, 1), _barriers(2, 2))  # fmt: skip
    fence_async_shared()
    sizes = Sizes(heads, group, batch_heads, rows, keys, n_tiles, n_items, sink, window, last)
    inputs = Inputs(route_ptr, prompt_ptr, start_ptr, sink_logits_ptr, lse_ptr)
    FLAGS: gl.constexpr = (HAS_ROUTE, HAS_PROMPT, DECODE_FULL, HAS_START, SINK_LOGITS, LSE)
    gl.warp_specialize(
        [
            (_consumer, (memory, bars, sizes, inputs, scale, 0, BN, D, STAGES, WAIT_LAST, SPARSE, SOFTCAP, FLAGS)),
            (_consumer, (memory, bars, sizes, inputs, scale, 1, BN, D, STAGES, WAIT_LAST, SPARSE, SOFTCAP, FLAGS)),
            (_producer, (memory, bars, sizes, inputs, counter_ptr, BN, STAGES, FLAGS)),
        ],
        [4, 1],
        [240, 24],
    )
