"""One prompt under several biases at once."""

from __future__ import annotations

import pytest
import torch

from fluxc.calibrate.runner import forced, run_biases, run_prompt
from fluxc.data import TokenizedPrompt
from fluxc.ir.graph import runnable
from fluxc.ir.sparse import SparseSettings
from fluxc.passes import route_pipeline
from fluxc.testing import ToyConfig, toy_program


def test_rows_of_a_batch_are_what_each_bias_gives_alone():
    routed = route_pipeline(pool=4, sparse=SparseSettings("streaming", 1, 4)).run(toy_program(ToyConfig()), "captured")
    module = runnable(routed.program)
    ids = torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = TokenizedPrompt(input_ids=ids, prompt_len=30, task="needle")
    biases = [forced([True, True]), forced([False, True]), forced([False, False]), torch.zeros(2)]
    together = run_biases(module, prompt, torch.stack(biases, dim=1))
    alone = [run_prompt(module, prompt, bias) for bias in biases]
    assert len({outcome.loss for outcome in alone[:3]}) == 3
    for mine, other in zip(together, alone, strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=1e-6)
        assert mine.exact == other.exact
        assert torch.equal(mine.routes, other.routes)
        torch.testing.assert_close(mine.scores, other.scores)
