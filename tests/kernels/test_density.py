"""`fluxc.kernels.density` against counting pairs one by one."""

import pytest

from fluxc.errors import UserError
from fluxc.kernels import density


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
