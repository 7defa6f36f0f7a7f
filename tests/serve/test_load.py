"""The load that `fluxc.bench.serve` puts on a server, and what it reports."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from fluxc.bench.load_client import Load, Seen
from fluxc.bench.load_report import faults, percentiles, summary
from fluxc.bench.load_requests import Ask, Mix

MIX = Mix("toy", 60, 8, cancel=0.2, malformed=0.2, max_tokens=8, words=6)


@pytest.fixture(scope="module")
def url(serving):
    with serving(max_queue=8) as (url, _):
        yield url


def test_a_mix_is_the_same_again_and_has_its_shares():
    asks = dataclasses.replace(MIX, requests=1000).asks()
    assert asks == dataclasses.replace(MIX, requests=1000).asks()
    kinds = [ask.kind for ask in asks]
    assert 150 < kinds.count("cancel") < 250 and 150 < kinds.count("malformed") < 250
    assert {ask.key for ask in asks if ask.kind == "good"} == set(range(8))


def test_answers_under_load_are_those_given_alone(url):
    asks = MIX.asks()
    good = list({ask.key: ask for ask in asks if ask.kind == "good"}.values())
    alone = {one.ask.key: one for one in asyncio.run(Load(url).closed(good, 1))}
    seen = asyncio.run(Load(url).closed(asks, 16))
    found = faults(seen, alone)
    assert found == {
        "good_unanswered": 0,
        "good_compared": sum(ask.kind == "good" for ask in asks),
        "good_differing": [],
        "malformed_not_4xx": [],
    }
    # 16 clients at a batch of 4 and a queue of 8: some were sent away, and came again.
    assert len(seen) == 60 and summary(seen, 1.0)["retries"] > 0


def test_arrivals_do_not_wait_for_answers(url):
    asks = [ask for ask in MIX.asks() if ask.kind == "good"][:10]
    seen = asyncio.run(Load(url).opened(asks, rate=200))
    report = summary(seen, 2.0)
    assert report["answered"] == 10 and report["requests_per_second"] == 5
    assert report["first_token"]["p50"] <= report["first_token"]["p99"] <= report["whole"]["p99"]


def test_what_is_wrong_is_reported():
    ask = Ask("good", "/v1/completions", {}, key=1)
    alone = {1: Seen(ask, 200, text="a", finish="stop")}
    seen = [
        Seen(ask, 200, text="a", finish="stop"),
        Seen(ask, 200, text="b", finish="stop"),
        Seen(ask, 500, error="broken"),
        Seen(Ask("malformed", "/v1/completions", b""), 200),
        Seen(Ask("malformed", "/v1/completions", b""), 400, error="named"),
    ]
    found = faults(seen, alone)
    assert (found["good_unanswered"], found["good_compared"], found["malformed_not_4xx"]) == (1, 3, [200])
    assert [one["under_load"] for one in found["good_differing"]] == ["b"]
    assert summary(seen, 1.0)["errors"] == {"broken": 1}


def test_percentiles_are_values_that_were_there():
    assert percentiles([None]) is None
    found = percentiles([*range(1, 101), None])
    assert (found["p50"], found["p90"], found["p99"], found["mean"]) == (50, 90, 99, 50.5)


def test_a_server_that_is_not_there_is_an_error_of_each_request():
    seen = asyncio.run(Load("http://127.0.0.1:9").closed(MIX.asks()[:3], 3))
    assert all(one.status == 0 and "ConnectError" in one.error for one in seen)
