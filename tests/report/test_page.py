"""The page: whole, without network, and right in a browser, in both schemes, on a desktop and on a phone."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fluxc.report.material import Material, gather
from fluxc.report.page import page
from fluxc.report.theme import DARK, LIGHT

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SCHEMES = {"light": "1", "dark": "0"}
VOID = {"meta", "br", "hr", "img", "link"}


@pytest.fixture(scope="module")
def material(toy: Path) -> Material:
    return gather(toy)


@pytest.fixture(scope="module")
def made(material: Material) -> str:
    return page(material)


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_tags_are_balanced(made: str) -> None:
    parser = Balanced()
    parser.feed(made)
    assert parser.open == []


def test_nothing_is_fetched_and_nothing_runs(made: str) -> None:
    assert set(re.findall(r"https?://[^\"'\s)]+", made)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in made and "@import" not in made and "url(" not in made


def test_it_says_what_it_shows(made: str) -> None:
    said = html.unescape(made)
    for words in ("Accuracy against Ω", "Which layers run full", "The plan in words", "How to reproduce"):
        assert words in said
    assert "2 attention layers have a router each; 1 more have a window of their own" in said
    assert "fluxc eval toy.flux --suite retrieval,text,local --count 8 --budget 0.2 --budget 0.4 --seed 1000" in said
    assert "rule of retrieval" in said


def test_without_results_it_says_how_to_get_them(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tmp_path / "alone.flux"
    shutil.copytree(toy, alone)
    monkeypatch.chdir(tmp_path)
    said = page(gather(alone))
    assert "fluxc eval alone.flux" in said and "fluxc bench alone.flux" in said
    assert "KV cache" in said


def test_another_plan_is_named(material: Material) -> None:
    assert material.evaluation is not None
    other = {**material.evaluation, "conditions": {**material.evaluation["conditions"], "plan": "f" * 64}}
    assert "Evaluated under the plan ffffffffffff" in page(dataclasses.replace(material, evaluation=other))
    assert "Evaluated under" not in page(material)


def test_long_answers_have_a_table(material: Material) -> None:
    assert material.evaluation is not None
    row = {"suite": "long-answer", "task": "prose", "prompt": 0, "system": "fluxc 0.4", "budget": 0.4, "routes": "10"}
    row |= {"decode": "sparse", "agree": 0.25, "loss": 0.0, "fresh": 0.5, "kv_bytes": 3000, "tokens": 99}
    rows = [*material.evaluation["rows"], row]
    said = page(dataclasses.replace(material, evaluation={**material.evaluation, "rows": rows}))
    assert "<td>0.25</td><td>1.00</td><td>0.50</td><td>3.0 kB</td>" in said


def browse(document: Path, scheme: str, *flags: str) -> str:
    """What Chromium prints."""
    profile = document.parent / "profile"
    colours = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    command = [BROWSER, *FLAGS, colours, f"--user-data-dir={profile}", *flags, f"file://{document}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


PROBE = """
<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<iframe id="f" style="width:WIDTHpx;height:900px;border:0" srcdoc="PAGE"></iframe>
<script>
addEventListener("load", () => {
  const inner = document.getElementById("f").contentDocument, root = inner.documentElement;
  const figures = [...inner.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  const texts = [...inner.querySelectorAll("figure svg text")].map(text => text.getBoundingClientRect());
  document.getElementById("out").textContent = "<<" + JSON.stringify({
    wide: root.scrollWidth, paper: getComputedStyle(inner.body).backgroundColor,
    figures: figures.map(box => [box.left, box.right, box.height]),
    out: texts.filter(box => box.left < 0 || box.right > root.clientWidth).length,
    low: Math.min(...texts.map(box => box.height)),
  }) + ">>";
});
</script><pre id="out"></pre>
"""

COUNT = """
<!doctype html><img id="shot" src="data:image/png;base64,IMAGE">
<script>
addEventListener("load", () => {
  const shot = document.getElementById("shot"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [shot.naturalWidth, shot.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(shot, 0, 0);
  const data = context.getImageData(0, 0, canvas.width, canvas.height).data, seen = {};
  for (let at = 0; at < data.length; at += 4) {
    const colour = "#" + [0, 1, 2].map(part => data[at + part].toString(16).padStart(2, "0")).join("");
    seen[colour] = (seen[colour] || 0) + 1;
  }
  document.getElementById("out").textContent = "<<" + JSON.stringify(seen) + ">>";
});
</script><pre id="out"></pre>
"""


def result(printed: str) -> Any:
    """The JSON that a page wrote into its last element."""
    return json.loads(html.unescape(printed).rsplit("<<", 1)[1].split(">>")[0])


@pytest.mark.skipif(not BROWSER, reason="no Chromium here (Debian's package chromium)")
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_in_a_browser(made: str, width: int, scheme: str, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(made)))
    found = result(browse(probe, scheme, "--window-size=1400,1000", "--dump-dom"))
    assert found["wide"] <= width, "nothing makes the page scroll sideways"
    paper = (LIGHT if scheme == "light" else DARK)["paper"]
    assert found["paper"] == "rgb({}, {}, {})".format(*bytes.fromhex(paper[1:]))
    assert len(found["figures"]) == 8
    assert all(0 <= left < right <= width and height > 100 for left, right, height in found["figures"])
    assert (found["out"], found["low"] > 9) == (0, True), "every label is on the page and large enough to read"


@pytest.mark.skipif(not BROWSER, reason="no Chromium here (Debian's package chromium)")
def test_a_screenshot_has_the_colours_of_the_figures(made: str, tmp_path: Path) -> None:
    document, shot, counter = (tmp_path / name for name in ("page.html", "shot.png", "count.html"))
    document.write_text(made)
    browse(document, "light", "--window-size=1280,2400", f"--screenshot={shot}")
    counter.write_text(COUNT.replace("IMAGE", base64.b64encode(shot.read_bytes()).decode()))
    seen = result(browse(counter, "light", "--dump-dom"))
    assert sum(seen.values()) == 1280 * 2400
    for name in ("paper", "card", "grid", "fluxc", "static", "need", "dense"):
        assert seen.get(LIGHT[name], 0) > 100, name
