"""The strip shows each layer once, in order."""

from __future__ import annotations

from fluxc.cli.strip import coloured, legend, strip


def test_one_sign_a_layer() -> None:
    assert strip({0: True, 1: False, 2: True}, [0, 1, 2]) == "█·█"


def test_layers_without_a_route_have_a_window() -> None:
    assert strip({1: False}, [0, 1]) == "w·"


def test_groups_of_ten() -> None:
    assert strip(dict.fromkeys(range(21), False), range(21)) == "·········· ·········· ·"


def test_colours_keep_the_signs() -> None:
    assert coloured("█ ·") == "[bold cyan]█[/] [yellow]·[/]"


def test_legend_has_what_occurs() -> None:
    assert legend("··") == "[yellow]·[/] sparse"
