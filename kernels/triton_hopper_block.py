"""Block-sparse attention for Hopper (sm_90) in Gluon: the pipeline of triton_hopper.py over lists of key blocks.

Only the producer reads the lists, one entry ahead of the tile it loads. It tells the consumers how many tiles an item
has and, with the last of them, whether an entry broke the schema's rules. The rows' own block, the last of its list,
comes first and alone needs a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from fluxc.kernels.triton_hopper import (
    LOG2E,
    ROWS,
    Barriers,
    Memory,
    _accumulator,
    _barriers,
    _load,
    _load_value,
    _operand,
    _output_rows,
    _scores,
    _softmax,
    _step,
    _values,
    copy_out,
)

OWN = gl.constexpr(1 << 10)  # above the tiles of the rows' own block that an item visits


class Sizes(NamedTuple):
    """Scalars of a launch. `group`: query heads of a key head; `tiles`: items of a head; `items`: work items in all;
    `blocks`: blocks of queries; `width`: entries of a list."""

    heads: Any
    group: Any
    rows: Any
    tiles: Any
    items: Any
    blocks: Any
    width: Any


class Lists(NamedTuple):
    """index i32[B,H,blocks,width], count i32[B,H,blocks]."""

    index: Any
    count: Any


@gluon.jit
def _work_item(item, sizes, HEAD_MAJOR: gl.constexpr):
    """Batch, head and first row of a work item, the last rows first: of all heads, or with HEAD_MAJOR of the heads that
    share keys, so that those keys stay in the L2 cache."""
    heads = sizes.heads
    if HEAD_MAJOR:
        heads = sizes.group
    several = sizes.tiles * heads
    place = item // several * heads + item % heads
    row = (sizes.tiles - 1 - item % several // heads) * (2 * ROWS)
    return place // sizes.heads, place % sizes.heads, row


@gluon.jit
def _put(value, slot, memory):
    memory.item.index(slot).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _get(slot, memory):
    return gl.max(memory.item.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@gluon.jit
def _announce(item, plan, turn, memory, bars):
    """Tell both warpgroups which item comes next, and its plan: tiles x OWN + tiles of its own block."""
    slot = turn & 1
    mbarrier.wait(bars.item_free.index(slot), ((turn >> 1) & 1) ^ 1)
    _put(item, slot, memory)
    _put(plan, slot + 2, memory)
    mbarrier.arrive(bars.item_full.index(slot), count=1)


@gluon.jit
def _next_item(turn, memory, bars):
    slot = turn & 1
    mbarrier.wait(bars.item_full.index(slot), (turn >> 1) & 1)
    item = _get(slot, memory)
    plan = _get(slot + 2, memory)
    mbarrier.arrive(bars.item_free.index(slot), count=1)
    return item, plan


@gluon.jit
def _producer(memory, bars, sizes, lists, counter_ptr, BLOCK: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
              HEAD_MAJOR: gl.constexpr):  # fmt: skip
    """Draw work items, follow their lists, and keep the key and value rings full."""
    PER: gl.constexpr = BLOCK // BN
    item = gl.program_id(0)
    turn = 0
    n = 0
    while item < sizes.items:
        b, h, row = _work_item(item, sizes, HEAD_MAJOR)
        hk = h // sizes.group
        own = row // BLOCK
        listed = (b * sizes.heads + h).to(gl.int64) * sizes.blocks + own
        index = lists.index + listed * sizes.width
        number = gl.load(index)
        given = gl.load(lists.count + listed)
        count = min(max(given, 0), sizes.width)
        has_own = ((count > 0) & (gl.load(index + max(count - 1, 0)) == own)).to(gl.int32)
        n_own = gl.cdiv(min(row + 2 * ROWS, sizes.rows) - own * BLOCK, BN) * has_own
        n_whole = min(count - has_own, own)
        spoiled = ((given != count) | (n_whole != count - has_own)).to(gl.int32)
        visits = n_own + n_whole * PER
        _announce(item, visits * OWN + n_own, turn, memory, bars)
        before = 0
        # Rows without a key visit one tile as well, all of it masked.
        for step in range(max(visits, 1)):
            tile = own * PER + step
            if (step >= n_own) & (step < visits):
                inside = min(max(number, 0), own - 1)
                spoiled = spoiled | (number != inside).to(gl.int32)
                tile = inside * PER + (step - n_own) % PER
            number = gl.load(index + min(max(step + 1 - n_own, 0) // PER, sizes.width - 1))
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
        # Free again: both warpgroups have left the item before the last, else they had not freed its queries. The
        # barrier of the last value tile makes it visible.
        _put(spoiled, 4 + (turn & 1), memory)
        _load_value(memory, bars, b, hk, before * BN, n - 1, STAGES)
        turn += 1
        item = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
    _announce(sizes.items, 0, turn, memory, bars)


@gluon.jit
def _consumer(memory, bars, sizes, sink_logits_ptr, scale, WG: gl.constexpr, BLOCK: gl.constexpr, BN: gl.constexpr,
              D: gl.constexpr, STAGES: gl.constexpr, WAIT_LAST: gl.constexpr, HEAD_MAJOR: gl.constexpr,
              SINK_LOGITS: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """One warpgroup: 64 query rows of each work item."""
    ROW: gl.constexpr = gl.SliceLayout(1, _accumulator(BN))
    PER: gl.constexpr = BLOCK // BN
    dtype: gl.constexpr = memory.o_desc.dtype
    q = memory.q.index(WG).reshape([ROWS, D])
    SHARED: gl.constexpr = memory.o is None
    out = q if SHARED else memory.o.index(WG).reshape([ROWS, D])
    turn = 0
    n = 0
    item, plan = _next_item(turn, memory, bars)
    while item < sizes.items:
        b, h, row = _work_item(item, sizes, HEAD_MAJOR)
        n_own = plan % OWN
        visits = max(plan // OWN, 1)
        first = row // BLOCK * PER
        if n_own == 0:
            first = 0  # a block before the rows': no mask cuts it
        if plan == 0:
            first = (row // BLOCK + 1) * PER  # after all rows
        upper = gl.minimum(row + WG * ROWS + gl.arange(0, ROWS, layout=ROW), sizes.rows - 1)
        m = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        total = gl.zeros([ROWS], gl.float32, ROW)
        if SINK_LOGITS:
            m = gl.full([ROWS], gl.load(sink_logits_ptr + h).to(gl.float32) * LOG2E, gl.float32, ROW)
            total = total + 1.0

        stage = n % STAGES
        mbarrier.wait(bars.q_full.index(WG), turn & 1)
        mbarrier.wait(bars.k_full.index(stage), (n // STAGES) & 1)
        s = warpgroup_mma_wait(0, [_scores(q, memory.k, stage, D)])
        mbarrier.arrive(bars.k_free.index(stage), count=1)
        p32, m, alpha = _softmax(s, m, scale, first, upper, upper, 0, True, False, SOFTCAP)
        total = total * alpha + gl.sum(p32, axis=1)
        p = _operand(p32, dtype, D)
        acc = gl.zeros([ROWS, D], gl.float32, _accumulator(D))
        n += 1
        mbarrier.wait(bars.k_full.index(n % STAGES), (n // STAGES) & 1, pred=visits > 1)
        if PER > 1:
            for step in range(1, n_own):
                acc, p, m, total = _step(acc, p, m, total, n, first + step, step + 1 < visits, q, upper, upper, 0,
                                         scale, memory, bars, True, False, SOFTCAP, D, STAGES, WAIT_LAST)  # fmt: skip
                n += 1
        for step in range(max(n_own, 1), visits):
            acc, p, m, total = _step(acc, p, m, total, n, 0, step + 1 < visits, q, upper, upper, 0, scale, memory, bars,
                                     False, False, SOFTCAP, D, STAGES, WAIT_LAST)  # fmt: skip
            n += 1
        if not SHARED:
            mbarrier.arrive(bars.q_free.index(WG), count=1)
        v_stage = (n - 1) % STAGES
        mbarrier.wait(bars.v_full.index(v_stage), ((n - 1) // STAGES) & 1)
        spoiled = _get(4 + (turn & 1), memory)
        acc = warpgroup_mma_wait(0, [_values(p, acc, memory.v, v_stage, D)])
        mbarrier.arrive(bars.v_free.index(v_stage), count=1)

        total = gl.where(total == 0.0, 1.0, total) + gl.where(spoiled != 0, float("nan"), 0.0)
        tma.store_wait(0)
        out.store((acc * _output_rows(1.0 / total, D)).to(dtype))
        fence_async_shared()
        copy_out(memory.o_desc, [b, row + WG * ROWS, h, 0], out.reshape([1, ROWS, 1, D]))
        if SHARED:
            tma.store_wait(0)
            mbarrier.arrive(bars.q_free.index(WG), count=1)
        turn += 1
        item, plan = _next_item(turn, memory, bars)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("heads", "group", "rows", "n_tiles", "n_items", "n_blocks", "width"))
def hopper_blocks(q_desc, k_desc, v_desc, o_desc, index_ptr, count_ptr, sink_logits_ptr, counter_ptr, scale, heads,
                  group, rows, n_tiles, n_items, n_blocks, width, D: gl.constexpr, BLOCK: gl.constexpr,
                  BN: gl.constexpr, STAGES: gl.constexpr, WAIT_LAST: gl.constexpr, HEAD_MAJOR: gl.constexpr,
                  SINK_LOGITS: gl.constexpr, SOFTCAP: gl.constexpr):  # fmt: skip
    """q [B,H,S,D], k, v [B,Hk,S,D] -> o [B,S,H,D] through TMA descriptors; index i32[B,H,n_blocks,width], count
    i32[B,H,n_blocks]; BLOCK a multiple of an item's 128 rows; `scale` includes log2(e)."""
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
        # Of two items in turn: the item, its plan, whether its list is spoiled.
        gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    bars = Barriers(_barriers(2, 1), _barriers(2, 1), _barriers(STAGES, 1), _barriers(STAGES, 2),
                    _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(2, 1), _barriers(2, 2))  # fmt: skip
    fence_async_shared()
    sizes = Sizes(heads, group, rows, n_tiles, n_items, n_blocks, width)
    lists = Lists(index_ptr, count_ptr)
    gl.warp_specialize(
        [
            (_consumer, (memory, bars, sizes, sink_logits_ptr, scale, 0, BLOCK, BN, D, STAGES, WAIT_LAST, HEAD_MAJOR,
                         SINK_LOGITS, SOFTCAP)),
            (_consumer, (memory, bars, sizes, sink_logits_ptr, scale, 1, BLOCK, BN, D, STAGES, WAIT_LAST, HEAD_MAJOR,
                         SINK_LOGITS, SOFTCAP)),
            (_producer, (memory, bars, sizes, lists, counter_ptr, BLOCK, BN, STAGES, HEAD_MAJOR)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
