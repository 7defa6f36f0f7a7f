"""The C++ program on a real engine (slow: two C++ compilers at work), and what its build refuses."""

from __future__ import annotations

import random
import re
import subprocess

import pytest
import torch

import fluxc
from fluxc.errors import BuilderError
from fluxc.exporters import aoti, cpp_build
from fluxc.kernels.schemas import SCHEMAS
from fluxc.toy_flux import TOY, toy_flux


def test_its_ops_have_the_schemas_of_the_python_ops():
    text = re.sub(r'"\s*\n\s*"', "", (cpp_build.SOURCES / "ops.cpp").read_text())
    found = dict(re.findall(r'm\.def\("(\w+)(\(.*?)"\);', text))
    assert found == {name: SCHEMAS[name] for name in aoti.OPS}


def test_a_build_that_fails(tmp_path, monkeypatch):
    (tmp_path / "ops.cpp").write_text("#error not today\n")
    monkeypatch.setattr(cpp_build, "SOURCES", tmp_path)
    with pytest.raises(BuilderError, match=r"last lines: .*not today"):
        cpp_build.build(tmp_path / "out")


@pytest.mark.slow
def test_its_output_is_the_python_engines(tmp_path):
    flux = toy_flux(tmp_path / "toy.flux")
    engine = fluxc.export(flux.path, target="aoti", output=tmp_path / "engine").path
    program = cpp_build.build(tmp_path / "cpp")
    own = aoti.phases(engine)
    with fluxc.load(engine) as loaded:
        for biases in ([torch.inf] * 2, [-torch.inf] * 2, [0.0, torch.inf], [0.0, 0.0]):
            for length in (1, 17, 90):
                prompt = random.Random(length).choices(range(2, TOY.vocab), k=length)
                at = torch.tensor([[length - 1]])
                expected = own.prefill(torch.tensor([prompt]), torch.tensor(biases)[:, None], at)
                routes = expected["routes"][:, 0].tolist()
                words = [str(engine), "20", ",".join(map(str, biases)), ",".join(map(str, prompt))]
                done = subprocess.run([program, *words], capture_output=True, text=True, check=True)
                said = {
                    line.split()[0]: [float(word) for word in line.split()[1:]] for line in done.stdout.splitlines()
                }
                assert said["routes"] == routes
                torch.testing.assert_close(torch.tensor([[said["logits"]]]), expected["logits"], rtol=1e-5, atol=1e-5)
                answer = loaded.generate(prompt, max_new_tokens=20, min_new_tokens=20, routes=routes)
                assert said["tokens"] == list(answer.tokens)
    gone = subprocess.run([program, tmp_path / "nothing", "1", "0", "1"], capture_output=True, text=True, check=False)
    assert (gone.returncode, gone.stderr.startswith("error: ")) == (1, True)
