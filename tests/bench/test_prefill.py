"""The prefill benchmark on a toy: every number is there and consistent; how long things take is not checked."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fluxc.bench.prefill import prefill
from fluxc.runtime.measure import bound, ideal
from fluxc.toy_flux import toy_flux


def test_the_benchmark_writes_times_with_bound_and_ideal(tmp_path):
    toy_flux(tmp_path / "toy.flux")
    output = tmp_path / "prefill.json"
    options = ["--length", "48", "--sparse-ratio", "0.5", "--repeats", "1", "--no-crossover", "-o", str(output)]
    done = CliRunner().invoke(prefill, [str(tmp_path / "toy.flux"), *options, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    length = json.loads(output.read_text())["lengths"][0]
    forced = length["routed"][0]
    dense, inside = length["dense"]["median"], length["attention"]["median"]
    assert 0 < inside < dense
    assert forced["sparse_ratio"] == 0.5
    assert forced["bound"] == pytest.approx(bound(dense, inside, 0.5))
    assert forced["ideal"] == pytest.approx(ideal(dense, inside, 0.5, length["density"]))
    assert forced["speedup"] == pytest.approx(dense / forced["seconds"]["median"])
