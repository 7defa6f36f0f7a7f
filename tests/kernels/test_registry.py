"""Registration: the exact schemas, once, and the providers of each op."""

import subprocess
import sys

import pytest
import torch

from fluxc import kernels
from fluxc.errors import InternalError
from fluxc.kernels import registry
from fluxc.kernels.define import Provider, choose
from fluxc.kernels.schemas import SCHEMAS
from fluxc.testing import random_qkv

kernels.register()
ATTENTIONS = ["attention", "streaming_attention", "triangle_attention"]


@pytest.mark.parametrize("op", registry.OPS)
def test_the_op_has_the_schema_of_the_table(op):
    schema = getattr(torch.ops.fluxc, op).default._schema
    assert schema == torch._C.parse_schema(f"fluxc::{op}{SCHEMAS[op]}")


def test_registering_again_changes_nothing():
    before = torch.ops.fluxc.attention.default
    kernels.register()
    assert torch.ops.fluxc.attention.default is before


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fluxc.kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("op", ATTENTIONS)
def test_every_call_has_a_provider(op):
    assert [p.name for p in registry.providers(op)][-1] == "pieces"
    assert {p.name for p in registry.providers(op)} >= {"triton", "pieces"}


def test_the_first_provider_that_supports_the_call_runs():
    q, k, v = random_qkv(1, 1, 1, 2, 4)
    refuses = Provider("refuses", lambda *x: "too small", lambda *x: pytest.fail("not asked"))
    takes = Provider("takes", lambda *x: None, lambda *x: x[0])
    assert choose("attention", (refuses, takes), q, k, v) is takes
    with pytest.raises(InternalError, match=r"no provider takes this call \(refuses: too small\)"):
        choose("attention", (refuses,), q, k, v)


@pytest.mark.parametrize("op", ATTENTIONS)
def test_triton_is_not_asked_on_the_cpu(op):
    triton = next(p for p in registry.providers(op) if p.name == "triton")
    assert triton.supported(*random_qkv(1, 1, 1, 2, 4)) == "needs a CUDA device"
