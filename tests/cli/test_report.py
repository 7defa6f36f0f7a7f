"""`fluxc report`: where it writes, what it finds by itself, and what it says to results that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fluxc.cli import main
from fluxc.toy_flux import toy_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_flux(tmp_path_factory.mktemp("report") / "toy.flux").path


def test_writes_a_page_and_says_what_is_missing(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(flux), "-o", str(out)]) == 0
    assert "not drawn, because nothing is stored: `fluxc eval` and `fluxc bench`" in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    assert main(["report", str(flux), "-o", str(out), "-q"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["report", str(flux), "-o", str(out), "-f", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == ["kv"]


def test_dry_run_writes_nothing(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(flux), "-o", str(tmp_path / "page.html"), "-n"]) == 0
    assert "would draw kv into" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--eval", None, "cannot read other.json"),
        ("--eval", "nonsense", "other.json is no JSON"),
        ("--eval", '{"format": 9}', "no result of `fluxc eval` of format 1"),
        ("--bench", '{"rows": []}', "holds no prefill times; `fluxc bench model.flux` writes them"),
    ],
)
def test_results_that_are_none(
    flux: Path,
    option: str,
    content: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("other.json").write_text(content)
    assert main(["report", str(flux), option, "other.json", "-q"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
