"""`fluxc.kernels.density` against counting pairs one by one."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels import density
from fluxc.kernels.block_attention.reference import visible
from fluxc.kernels.density import block_density
from fluxc.testing import random_qkv


def counted(kind, S, sink, window, last):
    def sees(i, j):
        dense = kind == "full" or (kind == "triangle" and i >= S - last)
        return dense or j < sink or i - j < window

    pairs = [(i, j) for i in range(S) for j in range(i + 1)]
    return sum(sees(i, j) for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("kind", ["full", "streaming", "triangle"])
@pytest.mark.parametrize("S", [1, 2, 6, 7, 8, 9, 30])
@pytest.mark.parametrize(("sink", "window", "last"), [(0, 1, 0), (2, 5, 3), (7, 1, 1), (3, 4, 100), (40, 2, 4)])
def test_equals_counting(kind, S, sink, window, last):
    assert density(kind, S, sink, window, last) == pytest.approx(counted(kind, S, sink, window, last), rel=1e-12)


def test_no_window_hides_nothing():
    assert density("streaming", 100, sink=4, window=0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("block", 5), "kind is 'block'"), (("streaming", 0, 1, 1), "S=0"), (("triangle", 5, 1, 1, -1), "last=-1")],
)
def test_bad_input(arguments, message):
    with pytest.raises(UserError, match=message):
        density(*arguments)


@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_block_density_equals_counting(rows):
    kernels.register()
    q, k, _ = random_qkv(2, 4, 2, rows, 8)
    options = {"scale": 0.5, "layer": 0, "block": 16, "stride": 4, "threshold": 0.6}
    index, count = torch.ops.fluxc.block_scores(q, k, **options)
    pairs = visible(index, count, rows, 16).sum((-1, -2)).double().mean() / (rows * (rows + 1) // 2)
    assert block_density(count, rows, 16) == pytest.approx(float(pairs), rel=1e-12)


def test_block_density_of_another_length():
    with pytest.raises(UserError, match="3 blocks counted, 100 tokens have 7 of 16"):
        block_density(torch.ones(1, 1, 3).int(), 100, 16)
