"""The router's shape, first weights, and exchange of weights with a program."""

from __future__ import annotations

import pytest
import torch

from fluxc.errors import OptionError, PlanError
from fluxc.passes.insert_routers import InsertRouters
from fluxc.router import LayerRouter, RouterSpec, init_router, layer_state, router_state, with_routers
from fluxc.testing import ToyConfig


@pytest.fixture(scope="module")
def program(toy):
    return InsertRouters().apply(toy(ToyConfig(windows=(0,)))).program


def test_parameters_of_a_layer_at_the_papers_width():
    assert sum(tensor.numel() for tensor in init_router(RouterSpec(128), 0).values()) == 592_002


def test_module_and_program_use_the_same_names(program):
    module = LayerRouter(RouterSpec(8))
    assert set(layer_state(router_state(program), 0)) == set(module.state_dict())
    assert {name: t.shape for name, t in module.state_dict().items()} == {
        name: t.shape for name, t in layer_state(router_state(program), 0).items()
    }


def test_seed_decides_the_weights():
    first, same, other = (init_router(RouterSpec(8), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["encoder.0.weight"], other["encoder.0.weight"])
    assert first["head.4.bias"].tolist() == [4.5, 0.0]


def test_first_routers_lean_to_full():
    pooled = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    assert (LayerRouter(RouterSpec(16)).score(pooled) > 3).all()


def test_new_weights_are_bound_and_the_rest_shared(program):
    state = {f"routers.0.{name}": t for name, t in init_router(RouterSpec(8), 7).items()}
    bound = with_routers(program, state)
    assert all(torch.equal(router_state(bound)[name], tensor) for name, tensor in state.items())
    assert bound.state_dict["embed.weight"] is program.state_dict["embed.weight"]
    assert not torch.equal(router_state(program)["routers.0.head.0.weight"], state["routers.0.head.0.weight"])


def test_foreign_weights_are_refused(program):
    with pytest.raises(PlanError, match=r"no router weight 'routers\.9\.head\.0\.weight'"):
        with_routers(program, {"routers.9.head.0.weight": torch.zeros(1)})
    with pytest.raises(PlanError, match="has no router weight"):
        with_routers(program, {"embed.weight": program.state_dict["embed.weight"]})
    with pytest.raises(PlanError, match=r"has shape \[1\]"):
        with_routers(program, {"routers.0.head.0.weight": torch.zeros(1)})


def test_sizes_are_checked():
    with pytest.raises(OptionError, match="width 0"):
        RouterSpec(0)
