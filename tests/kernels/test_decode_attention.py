"""`fluxc::decode_attention` against its reference."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.decode_attention import op
from fluxc.kernels.decode_attention.reference import decode_attention as reference
from fluxc.kernels.schemas import PAGE
from fluxc.testing import PoisonedMemory, assert_close

kernels.register()
decode = torch.ops.fluxc.decode_attention
HOW = {"scale": 0.3, "layer": 0}
LENS = [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5, 0]
PAGES = 4


def paged(lens=LENS, heads=4, kv_heads=2, width=16, dtype=torch.float32, seed=0):
    """q, a cache whose unused slots are NaN, a table with pages in random order and -1 past the end, lens."""
    generator = torch.Generator().manual_seed(seed)
    cache = torch.full((len(lens) * PAGES + 1, 2, kv_heads, PAGE, width), torch.nan, dtype=dtype)
    table = torch.randperm(len(lens) * PAGES + 1, generator=generator)[:-1].view(len(lens), PAGES).int()
    for b, n in enumerate(lens):
        for slot in range(n):
            token = torch.randn(2, kv_heads, width, generator=generator).to(dtype)
            cache[table[b, slot // PAGE], :, :, slot % PAGE] = token
        table[b, -(-n // PAGE) :] = -1
    q = torch.randn(len(lens), heads, width, generator=generator).to(dtype)
    return q, cache, table, torch.tensor(lens, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 16), (3, 3, 8), (9, 3, 64), (7, 1, 80)])
def test_equals_the_reference(heads, kv_heads, width, dtype):
    args = paged(heads=heads, kv_heads=kv_heads, width=width, dtype=dtype)
    assert_close(decode(*args, **HOW), reference(*(x.float() if x.is_floating_point() else x for x in args), **HOW))


def test_soft_cap_and_sink_logits():
    options = {**HOW, "softcap": 2.0, "sink_logits": torch.linspace(-1, 1, 4)}
    for features in (options, options | {"softcap": 0.0}):
        assert_close(decode(*paged(), **features), reference(*paged(), **features))


def test_a_request_is_the_same_alone_and_in_any_batch():
    q, cache, table, lens = paged()
    out = decode(q, cache, table, lens, **HOW)
    for b in range(len(LENS)):
        assert torch.equal(out[b], decode(q[b, None], cache, table[b, None], lens[b, None], **HOW)[0])


def test_a_request_without_slots_gets_zeros_and_every_row_is_written():
    with PoisonedMemory():
        out = op.run(*paged(), **HOW)
    assert out.isfinite().all()
    assert out[-1].eq(0).all()


def test_the_order_of_the_slots_does_not_matter():
    q, cache, table, lens = paged([3 * PAGE])
    turned = table[:, [2, 0, 1]]
    assert_close(decode(q, cache, turned, lens, **HOW), reference(q, cache, table, lens, **HOW))


@pytest.mark.parametrize("spread", [False, True])
def test_any_strides(spread):
    q, cache, table, lens = paged()
    wide = q.new_zeros(*q.shape[:2], 2 * q.shape[2])
    wide[..., ::2] = q
    whole = torch.full((cache.shape[0], 2, 5, PAGE, 16), torch.nan)
    whole[:, :, 1:3] = cache
    given = (wide[..., ::2] if spread else q.transpose(0, 1).contiguous().transpose(0, 1), whole[:, :, 1:3])
    out = decode(*given, table, lens, **HOW)
    assert out.is_contiguous()
    assert_close(out, reference(q, cache, table, lens, **HOW))


@pytest.mark.parametrize("sink_logits", [None, torch.zeros(4)])
def test_opcheck(sink_logits):
    torch.library.opcheck(decode.default, paged([3, PAGE + 1]), {**HOW, "sink_logits": sink_logits})


class Decodes(torch.nn.Module):
    def forward(self, q, cache, table, lens):
        return decode(q, cache, table, lens, **HOW)


def test_exports_with_any_batch_and_number_of_pages():
    batch, pages = torch.export.Dim("batch", min=1), torch.export.Dim("pages", min=1)
    shapes = ({0: batch}, {}, {0: batch, 1: pages}, {0: batch})
    args = paged([3, 70, 5])
    program = torch.export.export(Decodes(), args, dynamic_shapes=shapes)
    for count, width in ((1, 1), (3, 2)):
        q, cache, table, lens = args
        given = (q[:count], cache, table[:count, :width].contiguous(), lens[:count])
        assert torch.equal(program.module()(*given), Decodes()(*given))


BAD = {
    "pages of another size": ({"cache": torch.zeros(9, 2, 2, 32, 16)}, r"cache must be \[pages,2,Hk,64,D\]"),
    "another dtype": ({"cache": torch.zeros(9, 2, 2, PAGE, 16).half()}, "cache is torch.float16"),
    "another width": ({"cache": torch.zeros(9, 2, 2, PAGE, 8)}, "q has width 16, the cache 8"),
    "heads that do not fit": ({"cache": torch.zeros(9, 2, 3, PAGE, 16)}, "q has 4 heads, no multiple of the cache's 3"),
    "a query axis too many": ({"q": torch.zeros(2, 4, 1, 16)}, r"q must be \[B,H,D\]"),
    "no heads": ({"q": torch.zeros(2, 0, 16)}, "q is empty"),
    "lens of int64": ({"lens": torch.tensor([3, 5])}, "lens must be int32"),
    "table of another batch": ({"page_table": torch.zeros(1, 4, dtype=torch.int32)}, r"page_table must be \[2,P\]"),
    "lens past the table": ({"lens": torch.tensor([3, 257]).int()}, r"lens must lie in 0..256.*found 3..257"),
    "negative lens": ({"lens": torch.tensor([-1, 5]).int()}, "lens must lie in 0..256"),
    "page past the cache": ({"page_table": torch.full((2, 4), 9).int()}, r"page_table must lie in 0..8, found 9..9"),
    "sink logits of other heads": ({"sink_logits": torch.zeros(3)}, r"sink_logits must be \[4\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    given = dict(zip(("q", "cache", "page_table", "lens"), paged([3, 5]), strict=True)) | changes
    with pytest.raises(UserError, match=f"fluxc::decode_attention: {message}"):
        decode(**given, **HOW)
