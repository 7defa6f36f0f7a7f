"""`fluxc::routed_attention`: each request is its branch, bit for bit."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.routed_attention import op
from fluxc.kernels.routed_attention.reference import routed_attention as reference
from fluxc.testing import GRADIENT_FACTOR, PoisonedMemory, assert_close, gradients, layouts, random_qkv

kernels.register()
routed = torch.ops.fluxc.routed_attention
ops = torch.ops.fluxc
HOW = {"scale": 0.3, "layer": 0}
SIZES = {"sink": 3, "window": 20, "last": 10}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FULL_BY_BLOCK = {"full_kind": "block", "block": 16, "stride": 4, "threshold": 0.5}
KINDS = {
    "streaming": {"kind": "streaming"},
    "streaming, decode full": {"kind": "streaming", "decode_full": True},
    "triangle": {"kind": "triangle"},
    "triangle, decode full": {"kind": "triangle", "decode_full": True},
    "block": {"kind": "block", "decode_full": True, "block": 16, "stride": 4, "threshold": 0.5},
    "full by block": {"kind": "streaming", **FULL_BY_BLOCK},
    "triangle, full by block": {"kind": "triangle", "decode_full": True, **FULL_BY_BLOCK},
}
ROUTES = [[True, True, True], [False, False, False], [True, False, True], [False, True, False]]
PROMPTS = torch.tensor([90, 60, 1])


def full(q, k, v, prompt_lens, kind, full_kind="dense", decode_full=False, block=0, stride=0, threshold=0.0, **options):
    """The full branch by the op of its kind."""
    if full_kind == "block":
        return by_blocks(q, k, v, int(prompt_lens), block, stride, threshold, **options)
    return ops.attention(q, k, v, **HOW, **options)


def sparse(q, k, v, prompt_lens, kind, full_kind="dense", decode_full=False, **options):
    """The sparse branch by the op of its kind."""
    if full_kind == "block":
        options = {name: value for name, value in options.items() if name not in FULL_BY_BLOCK}
    if kind == "block":
        return by_blocks(q, k, v, int(prompt_lens), **options)
    if kind == "triangle":
        return ops.triangle_attention(q, k, v, prompt_lens, **HOW, **SIZES, decode_full=decode_full, **options)
    if decode_full:
        sizes = SIZES | {"last": 0}
        return ops.triangle_attention(q, k, v, prompt_lens, **HOW, **sizes, decode_full=True, **options)
    return ops.streaming_attention(q, k, v, **HOW, sink=3, window=20, **options)


def by_blocks(q, k, v, n, block, stride, threshold, **features):
    """Scored blocks for the prompt's n rows, all keys for the rest."""
    prompt = [x[:, :, :n] for x in (q, k, v)]
    lists = ops.block_scores(*prompt[:2], **HOW, block=block, stride=stride, threshold=threshold)
    parts = [ops.block_attention(*prompt, *lists, **HOW, block=block, **features)]
    if n < q.shape[2]:
        parts.append(ops.attention(q[:, :, n:], k, v, **HOW, **features, q_start=torch.tensor([n])))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equals_the_reference(routes, kind):
    q, k, v = random_qkv(3, 4, 2, 90, 16)
    options = {**HOW, **SIZES, **kind}
    route = torch.tensor(routes)
    assert_close(routed(q, k, v, route, PROMPTS, **options), reference(q, k, v, route, PROMPTS, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 90, 700])
def test_all_full_is_attention_bit_for_bit(dtype, rows):
    q, k, v = random_qkv(3, 4, 2, rows, 16, dtype=dtype)
    for batch in (slice(0, 1), slice(0, 3)):
        b_q, b_k, b_v = q[batch], k[batch], v[batch]
        full = torch.ones(len(b_q), dtype=torch.bool)
        out = routed(b_q, b_k, b_v, full, full.long(), **HOW, **SIZES, kind="streaming")
        assert torch.equal(out, ops.attention(b_q, b_k, b_v, **HOW))


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_request_is_its_branch_alone_bit_for_bit(routes, kind, dtype):
    q, k, v = random_qkv(3, 4, 2, 90, 16, dtype=dtype)
    features = {"softcap": 3.0, "sink_logits": torch.linspace(-1, 1, 4).to(dtype)}
    out = routed(q, k, v, torch.tensor(routes), PROMPTS, **HOW, **SIZES, **kind, **features)
    assert out.is_contiguous()
    for b, is_full in enumerate(routes):
        one = slice(b, b + 1)
        alone = (q[one], k[one], v[one])
        branch = full if is_full else sparse
        assert torch.equal(out[one], branch(*alone, PROMPTS[one], **kind, **features))


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("kind", ["triangle", "triangle, full by block"])
def test_the_tape_changes_no_bit(routes, kind):
    q, k, v = random_qkv(3, 4, 2, 90, 16)
    options = {**HOW, **SIZES, **KINDS[kind]}
    taped = routed(q.clone().requires_grad_(), k, v, torch.tensor(routes), PROMPTS, **options)
    assert torch.equal(taped.detach(), routed(q, k, v, torch.tensor(routes), PROMPTS, **options))


@pytest.mark.parametrize("layout", ["heads first", "rows first", "rows apart", "width first"])
def test_any_strides(layout):
    q, k, v = (layouts(x)[layout] for x in random_qkv(3, 4, 2, 50, 8))
    route, options = torch.tensor([True, False, True]), {**HOW, **SIZES, "kind": "streaming"}
    prompts = torch.tensor([50, 20, 1])
    assert_close(routed(q, k, v, route, prompts, **options), reference(q, k, v, route, prompts, **options))


@pytest.mark.parametrize("routes", ROUTES)
def test_every_row_is_written(routes):
    q, k, v = random_qkv(3, 4, 2, 90, 8)
    with PoisonedMemory():
        out = op.run(q, k, v, torch.tensor(routes), PROMPTS, **HOW, **SIZES, kind="triangle")
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradcheck(kind):
    q, k, v = random_qkv(2, 2, 1, 11, 4, 3, dtype=torch.float64, requires_grad=True)
    sinks = torch.linspace(-1, 1, 2, dtype=torch.float64).requires_grad_()
    sizes = {"sink": 2, "window": 3, "last": 2}

    def run(q, k, v, sinks):
        route, prompts = torch.tensor([False, True]), torch.tensor([9, 11])
        return routed(q, k, v, route, prompts, **HOW, **sizes, **kind, sink_logits=sinks)

    assert torch.autograd.gradcheck(run, (q, k, v, sinks), fast_mode=True)


@pytest.mark.parametrize("kind", ["triangle", "block", "triangle, full by block"])
def test_gradients_equal_the_reference(kind):
    inputs = random_qkv(3, 4, 2, 90, 8)
    options = {**HOW, **SIZES, **KINDS[kind]}
    route = torch.tensor([False, True, False])
    actual = gradients(lambda *x: routed(*x, route, PROMPTS, **options), *inputs)
    expected = gradients(lambda *x: reference(*x, route, PROMPTS, **options), *inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, factor=GRADIENT_FACTOR)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("routes", ROUTES[1:3])
@pytest.mark.parametrize("kind", ["triangle", "block", "full by block"])
def test_opcheck(kind, routes, grad):
    q, k, v = random_qkv(3, 4, 2, 90, 8, 6, requires_grad=grad)
    options = {**HOW, **SIZES, **KINDS[kind]}
    torch.library.opcheck(routed.default, (q, k, v, torch.tensor(routes), PROMPTS), options)


class Routes(torch.nn.Module):
    def forward(self, q, k, v, scores, prompt_lens):
        return routed(q, k, v, scores > 0, prompt_lens, **HOW, **SIZES, kind="streaming")


def test_exports_with_any_batch_and_length():
    batch, rows = torch.export.Dim("batch", min=1), torch.export.Dim("rows", min=1)
    sample = (*random_qkv(2, 4, 2, 6, 8), torch.tensor([1.0, -1.0]), torch.tensor([6, 6]))
    program = torch.export.export(Routes(), sample, dynamic_shapes=({0: batch, 2: rows},) * 3 + ({0: batch},) * 2)
    assert [r.lower for r in program.range_constraints.values()] == [1, 1]
    for size, length in ((1, 1), (1, 60), (3, 61)):
        inputs = (*random_qkv(size, 4, 2, length, 8), torch.linspace(-1, 1, size), torch.full((size,), length))
        assert torch.equal(program.module()(*inputs), Routes()(*inputs))


BAD = {
    "route of another batch": ({"route": torch.tensor([True])}, r"route must be \[2\], is \(1,\)"),
    "route with an axis more": ({"route": torch.ones(1, 2, dtype=torch.bool)}, r"route must be \[2\], is \(1, 2\)"),
    "route of numbers": ({"route": torch.ones(2)}, "route must be bool"),
    "block with a ring": ({"kind": "block", "block": 16, "stride": 4, "threshold": 0.5}, "decode_full is False"),
    "block of no size": ({"kind": "block", "decode_full": True}, "block is 0"),
    "full by block of no size": ({"full_kind": "block", "route": torch.tensor([True, True])}, "block is 0"),
    "both by block": (
        {"kind": "block", "full_kind": "block", "decode_full": True, "block": 16, "stride": 4, "threshold": 0.5},
        "both branches would be the same",
    ),
    "unknown full kind": ({"full_kind": "sparse"}, "full_kind is 'sparse'"),
    "unknown kind": ({"kind": "diagonal"}, "kind is 'diagonal'"),
    "negative sink": ({"sink": -1}, "sink is -1"),
    "prompt too long": ({"prompt_lens": torch.tensor([6, 9]), "kind": "triangle"}, "prompt_lens must lie in 0..6"),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message, grad):
    q, k, v = random_qkv(2, 4, 2, 6, 8, requires_grad=grad)
    given = {"route": torch.tensor([True, False]), "prompt_lens": torch.tensor([6, 6])}
    given |= {**HOW, **SIZES, "kind": "streaming"} | changes
    with pytest.raises(UserError, match=f"fluxc::(routed_attention|block_scores): .*{message}"):
        routed(q, k, v, given.pop("route"), given.pop("prompt_lens"), **given)
