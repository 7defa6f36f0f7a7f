"""`fluxc::router` against its reference, and against the router that fitting trains."""

import pytest
import torch

from fluxc import kernels
from fluxc.errors import UserError
from fluxc.kernels.router.reference import router as reference
from fluxc.router import LayerRouter, RouterSpec
from fluxc.testing import assert_close, random_qkv

kernels.register()
router, router_pool = torch.ops.fluxc.router, torch.ops.fluxc.router_pool
LENGTHS = torch.tensor([40, 7, 1])
NAMES = ("encoder.0", "encoder.2", "head.0", "head.2", "head.4")


def queries(width=16, dtype=torch.float32):
    return random_qkv(3, 4, 4, 40, width, dtype=dtype)[0]


def module(width=16):
    return LayerRouter(RouterSpec(width=width, pool=10), seed=3)


def weights(width=16):
    state = module(width).state_dict()
    return [state[f"{name}.{part}"] for name in NAMES for part in ("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64])
def test_equals_the_reference(width, dtype):
    q = queries(width, dtype)
    out = router(q, LENGTHS, *weights(width), pool=10)
    assert out.dtype == torch.float32
    assert_close(out, reference(q.float(), LENGTHS, *weights(width), pool=10))


def test_equals_the_pool_and_the_module():
    pooled = router_pool(queries(), LENGTHS, pool=10)
    assert_close(router(queries(), LENGTHS, *weights(), pool=10), module()(pooled).detach())


def test_opcheck():
    torch.library.opcheck(router.default, (queries(), LENGTHS, *weights()), {"pool": 10})


BAD = {
    "an empty prompt": ({"lengths": torch.tensor([40, 0, 1])}, "prompt_lens must lie in 1..40"),
    "no pool": ({"pool": 0}, "pool is 0"),
    "a router of another width": ({"weights": weights(8)}, r"encoder_0_weight must be torch.float32 \(128, 16\)"),
    "half weights": ({"weights": [w.half() for w in weights()]}, "encoder_0_weight must be torch.float32"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_op_and_argument(changes, message):
    given = {"lengths": LENGTHS, "weights": weights(), "pool": 10} | changes
    with pytest.raises(UserError, match=f"fluxc::router: {message}"):
        router(queries(), given["lengths"], *given["weights"], pool=given["pool"])
