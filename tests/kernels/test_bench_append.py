"""What the benchmark of turns and writes compares is one and the same: shown on the CPU with small sizes."""

import pytest
import torch.nn.functional as F

pytest.importorskip("triton")

from fluxc import kernels
from fluxc.kernels.bench import append, writes
from fluxc.kernels.bench.cases import Shape
from fluxc.testing import assert_close

kernels.register()
SHAPE = Shape(4, 2, 16)


@pytest.mark.parametrize(("sink", "window"), ((0, 0), (5, 70), (0, 40)))
@pytest.mark.parametrize("rows", [1, 30, 90])
def test_a_turn_is_the_same_over_pages_and_over_contiguous_keys(rows, sink, window):
    x = append.turn(SHAPE, 200, rows, sink, window, device="cpu")
    assert len(x.held) == (sink + window if window else 200)
    runs = append.contenders([x], 0.25)
    assert append.error(runs["ours"], x, 0.25, dense=False) < 1e-5
    k, v = (y[:, :, x.visible()] for y in (x.k, x.v))
    masked = F.scaled_dot_product_attention(x.q, k, v, x.seen(x.visible()), scale=0.25, enable_gqa=True)
    assert_close(masked.transpose(1, 2), append.reference(x, 0.25))


def test_a_wrong_turn_has_an_error():
    x = append.turn(SHAPE, 200, 30, 5, 70, device="cpu")
    dense = append.reference(x, 0.25, dense=True)
    assert append.error(lambda _: dense, x, 0.25, dense=False) > 0.1
    assert append.error(lambda _: dense, x, 0.25, dense=True) == 0

    def refused(_):
        raise RuntimeError("No available kernel")

    assert append.error(refused, x, 0.25, dense=True) != append.error(refused, x, 0.25, dense=True)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 130)])
def test_both_writes_leave_the_same_bits(batch, tokens, monkeypatch):
    x = writes.write(SHAPE, batch, tokens, device="cpu")
    assert writes.same_bits(x)
    assert not x.cache.any()
    assert x.bytes == 2 * 2 * batch * tokens * 2 * 16 * 2
    monkeypatch.setattr(writes, "indexed", lambda x: x.cache[:, 0].fill_(1))
    assert not writes.same_bits(x)
