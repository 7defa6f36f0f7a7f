"""`fluxc::append_attention`: turns on top of a kept cache, against recomputing the whole sequence."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.append_attention import op
from fluxc.kernels.append_attention.reference import append_attention as reference
from fluxc.kernels.attention.reference import attention
from fluxc.kernels.schemas import PAGE
from fluxc.kernels.streaming_attention.reference import streaming_attention
from fluxc.testing import PoisonedMemory, assert_close, layouts, random_qkv

kernels.register()
append = torch.ops.fluxc.append_attention
HOW = {"scale": 0.3, "layer": 0}
SINK, WINDOW = 5, 40
TURNS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]
# Tokens before the turn: none, inside the sink, a ring that fills up in the turn, just full, wrapped, wrapped often.
STARTS = [0, 3, 20, SINK + WINDOW, SINK + WINDOW + 7, 4 * WINDOW + 3]
ROUTES = {"full": (0, 0), "ring": (SINK, WINDOW), "own window": (0, WINDOW)}


def slot_of(position, sink, window):
    """Where the engine keeps a position."""
    return position if window == 0 or position < sink else sink + (position - sink) % window


def kept(k, v, starts, routes, seed=0):
    """The cache after starts[b] tokens of k, v [B,Hk,T,D], written one by one: cache, page_table, lens."""
    pages = -(-max(starts, default=0) // PAGE) or 1
    order = torch.randperm(len(starts) * pages, generator=torch.Generator().manual_seed(seed))
    table = order.view(len(starts), pages).int()
    cache = k.new_full((len(starts) * pages, 2, k.shape[1], PAGE, k.shape[3]), torch.nan)
    for b, (start, (sink, window)) in enumerate(zip(starts, routes, strict=True)):
        for position in range(start):
            page, offset = divmod(slot_of(position, sink, window), PAGE)
            cache[table[b, page], 0, :, offset] = k[b, :, position]
            cache[table[b, page], 1, :, offset] = v[b, :, position]
    pairs = zip(starts, routes, strict=True)
    lens = [start if window == 0 else min(start, sink + window) for start, (sink, window) in pairs]
    return cache, table, torch.tensor(lens, dtype=torch.int32)


def whole_and_turn(turn, starts, routes, heads=(4, 2), width=16, dtype=torch.float32):
    """Everything up to the end of the turn, and the arguments of the op for the turn alone."""
    q, k, v = random_qkv(len(starts), *heads, max(starts) + turn, width, dtype=dtype)
    cache, table, lens = kept(k, v, starts, routes)
    own = [torch.stack([x[b, :, at : at + turn] for b, at in enumerate(starts)]) for x in (q, k, v)]
    sinks, windows = torch.tensor(routes).T
    return (q, k, v), (*own, cache, table, lens, torch.tensor(starts), sinks.clone(), windows.clone())


def recomputed(q, k, v, turn, starts, routes, **options):
    """The turn's rows out of attention over the whole sequence, in fp32: [B,S,H,D]."""
    rows = []
    for b, (start, (sink, window)) in enumerate(zip(starts, routes, strict=True)):
        x = [y[b, None, :, : start + turn].float() for y in (q, k, v)]
        sparse = {"sink": sink, "window": window}
        out = streaming_attention(*x, **HOW, **sparse, **options) if window else attention(*x, **HOW, **options)
        rows.append(out[:, start:])
    return torch.cat(rows)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("turn", TURNS)
def test_equals_recomputing_everything(turn, route):
    for start in STARTS:
        whole, args = whole_and_turn(turn, [start], [route])
        assert_close(append(*args, **HOW), recomputed(*whole, turn, [start], [route]))


@pytest.mark.parametrize("turn", TURNS)
def test_routes_and_starts_differ_in_a_batch(turn):
    routes = [route for route in ROUTES.values() for _ in STARTS]
    starts = STARTS * len(ROUTES)
    whole, args = whole_and_turn(turn, starts, routes)
    assert_close(append(*args, **HOW), recomputed(*whole, turn, starts, routes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 16), ((3, 3), 8), ((9, 3), 64)])
def test_dtypes_and_heads(heads, width, dtype):
    starts, routes = [70, 3, 160], list(ROUTES.values())
    whole, args = whole_and_turn(WINDOW + 1, starts, routes, heads, width, dtype)
    assert_close(append(*args, **HOW), recomputed(*whole, WINDOW + 1, starts, routes))


def test_soft_cap_and_sink_logits():
    starts, routes = [70, 3, 160], list(ROUTES.values())
    options = {"softcap": 2.0, "sink_logits": torch.linspace(-1, 1, 4)}
    whole, args = whole_and_turn(9, starts, routes)
    assert_close(append(*args, **HOW, **options), recomputed(*whole, 9, starts, routes, **options))


def test_the_reference_is_recomputing_too():
    starts, routes = [70, 3, 160], list(ROUTES.values())
    whole, args = whole_and_turn(WINDOW + 1, starts, routes)
    assert_close(reference(*args, **HOW), recomputed(*whole, WINDOW + 1, starts, routes))


def test_a_turn_then_another_equals_one_of_both():
    for route in ROUTES.values():
        whole, args = whole_and_turn(60, [100], [route])
        later = whole_and_turn(25, [135], [route])[1]
        q, k, v = (x[:, :, 100:160] for x in whole)
        cache, table, lens = kept(whole[1], whole[2], [135], [route])
        second = (q[:, :, 35:], k[:, :, 35:], v[:, :, 35:], cache, table, lens, *later[6:])
        assert_close(append(*second, **HOW), append(*args, **HOW)[:, 35:].float())


def test_padding_of_a_turn_changes_no_bit_of_it_and_is_finite():
    for route in ROUTES.values():
        _, args = whole_and_turn(30, [100], [route])
        short = [x[:, :, :11] for x in args[:3]]
        out = append(*args, **HOW)
        assert out.isfinite().all()
        assert_close(out[:, :11], append(*short, *args[3:], **HOW).float())


def test_a_request_is_the_same_alone_and_in_any_batch():
    starts, routes = [70, 3, 160], list(ROUTES.values())
    _, args = whole_and_turn(50, starts, routes)
    q, k, v, cache, *rest = args
    out = append(*args, **HOW)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(out[one], append(q[one], k[one], v[one], cache, *(x[one] for x in rest), **HOW))


def test_every_row_is_written():
    _, args = whole_and_turn(50, [70, 3, 160], list(ROUTES.values()))
    with PoisonedMemory():
        out = op.run(*args, **HOW)
    assert out.isfinite().all()
    assert out.is_contiguous()


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    _, args = whole_and_turn(50, [70, 3, 160], list(ROUTES.values()))
    q, k, v = (layouts(x)[layout] for x in args[:3])
    assert_close(append(q, k, v, *args[3:], **HOW), reference(*args, **HOW))


@pytest.mark.parametrize("sink_logits", [None, torch.zeros(4)])
def test_opcheck(sink_logits):
    _, args = whole_and_turn(9, [70, 3, 160], list(ROUTES.values()))
    torch.library.opcheck(append.default, args, {**HOW, "sink_logits": sink_logits})


class Appends(torch.nn.Module):
    def forward(self, *args):
        return append(*args, **HOW)


def in_a_cache_of_12_pages(args):
    cache = torch.zeros(12, 2, 2, PAGE, 16)
    cache[: len(args[3])] = args[3]
    return (*args[:3], cache, *args[4:])


def test_exports_with_any_batch_turn_and_number_of_pages():
    batch, pages, turn = (torch.export.Dim(name, min=1) for name in ("batch", "pages", "turn"))
    shapes = (*({0: batch, 2: turn},) * 3, {}, {0: batch, 1: pages}, *({0: batch},) * 4)
    sample = in_a_cache_of_12_pages(whole_and_turn(9, [70, 3, 160], list(ROUTES.values()))[1])
    program = torch.export.export(Appends(), sample, dynamic_shapes=(shapes,))
    for rows, starts in ((1, [3]), (50, [70, 160])):
        args = in_a_cache_of_12_pages(whole_and_turn(rows, starts, [ROUTES["ring"]] * len(starts))[1])
        assert torch.equal(program.module()(*args), Appends()(*args))


BAD = {
    "rows of one head": ({"q": torch.zeros(2, 9, 16)}, r"q must be \[B,H,S,D\]"),
    "another turn's keys": ({"k": torch.zeros(2, 2, 8, 16)}, r"k must be \(2, 2, 9, 16\)"),
    "values of another dtype": ({"v": torch.zeros(2, 2, 9, 16).half()}, "v must be .* of torch.float16"),
    "another batch": ({"start": torch.tensor([70])}, r"start must be int64 \[2\]"),
    "windows of int32": ({"windows": torch.tensor([0, 40]).int()}, r"windows must be int64 \[2\]"),
    "negative start": ({"start": torch.tensor([70, -3])}, "start must not be negative, found -3"),
    "a sink without a window": ({"windows": torch.tensor([0, 0])}, "sinks must be 0 where windows is 0"),
    "a turn counted as cached": (
        {"lens": torch.tensor([79, 12]).int()},
        r"lens must be start.*: is \[79, 12\]",
    ),
    "lens past the table": ({"lens": torch.tensor([70, 300]).int()}, r"lens must lie in 0..128"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    names = ("q", "k", "v", "cache", "page_table", "lens", "start", "sinks", "windows")
    _, args = whole_and_turn(9, [70, 3], [(0, 0), (SINK, WINDOW)])
    with pytest.raises(UserError, match=f"fluxc::append_attention: {message}"):
        append(**dict(zip(names, args, strict=True)) | changes, **HOW)
