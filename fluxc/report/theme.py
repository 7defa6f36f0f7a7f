"""The colours of all figures by what they stand for, in light and in dark, and the page's style sheet."""

from __future__ import annotations

LIGHT = {
    "paper": "#f6f6f2",
    "card": "#ffffff",
    "ink": "#1b1d21",
    "mute": "#676c74",
    "grid": "#e4e4de",
    "fluxc": "#0f766e",
    "static": "#c2570c",
    "random": "#8a919b",
    "blind": "#a3826a",
    "sparse": "#be123c",
    "dense": "#1b1d21",
    "oracle": "#6d4bd8",
    "need": "#b7791f",
}
DARK = {
    "paper": "#0e1113",
    "card": "#161a1d",
    "ink": "#e9e8e3",
    "mute": "#9aa2aa",
    "grid": "#2b3136",
    "fluxc": "#2dd4bf",
    "static": "#fb923c",
    "random": "#8b949e",
    "blind": "#c9a98d",
    "sparse": "#fb7185",
    "dense": "#e9e8e3",
    "oracle": "#a78bfa",
    "need": "#f2b84b",
}
FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def colour_rules() -> str:
    """Classes f-NAME (fill) and s-NAME (stroke) for both schemes, for a drawing that stands alone."""
    dark = "".join(_rules(DARK))
    return "".join(_rules(LIGHT)) + f"@media (prefers-color-scheme: dark){{{dark}}}"


def _rules(colours: dict[str, str]) -> list[str]:
    return [f".f-{name}{{fill:{value}}}.s-{name}{{stroke:{value}}}" for name, value in colours.items()]


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def style_sheet() -> str:
    """The style of the page; every colour comes from one of the two tables above."""
    classes = "".join(f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in LIGHT)
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media (prefers-color-scheme: dark){{:root{{{_variables(DARK)}}}}}{classes}{_PAGE}"
    )


_PAGE = (
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 FONT;
  font-variant-numeric:tabular-nums;text-rendering:optimizeLegibility}
main{max-width:1120px;margin:0 auto;padding:clamp(20px,4vw,56px) clamp(16px,3vw,32px) 72px}
header{margin-bottom:34px}
.kicker{color:var(--fluxc);font-weight:650;letter-spacing:.02em;margin:0 0 6px}
h1{font-size:clamp(30px,5vw,46px);line-height:1.08;letter-spacing:-.025em;margin:0 0 14px;font-weight:720;
  overflow-wrap:anywhere}
.lead{font-size:clamp(17px,2vw,20px);line-height:1.5;max-width:44em;margin:0;color:var(--ink)}
h2{font-size:23px;letter-spacing:-.015em;margin:52px 0 4px;font-weight:700}
.sub{color:var(--mute);max-width:48em;margin:0 0 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:12px;margin:30px 0 0}
.tile{background:var(--card);border:1px solid var(--grid);border-radius:14px;padding:15px 16px 14px}
.tile b{display:block;font-size:30px;line-height:1.1;letter-spacing:-.03em;font-weight:700}
.tile span{display:block;color:var(--mute);font-size:13.5px;line-height:1.35;margin-top:6px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:16px;align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:16px;
  padding:18px 18px 14px;min-width:0}
figure h3{margin:0 0 2px;font-size:16.5px;letter-spacing:-.01em;font-weight:660}
figure svg{display:block;width:100%;height:auto;margin:6px 0 0;overflow:visible}
figcaption{color:var(--mute);font-size:13.5px;line-height:1.45;margin-top:6px}
.card{background:var(--card);border:1px solid var(--grid);border-radius:16px;padding:18px 20px;min-width:0}
.hint{margin-top:16px}.warn{color:var(--static)}.tall{grid-row:span 2}
.card p{margin:0 0 10px}.card p:last-child{margin:0}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:14px;white-space:nowrap}
th,td{padding:7px 12px 7px 0;text-align:right;border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}
th{color:var(--mute);font-weight:560;font-size:13px}
tr:last-child td{border-bottom:0}
tr.ours td{color:var(--fluxc);font-weight:620}
details{margin-top:14px}summary{cursor:pointer;color:var(--mute);font-size:14.5px;padding:4px 0}
details[open] summary{margin-bottom:8px}
pre{background:var(--card);border:1px solid var(--grid);border-radius:12px;padding:14px 16px;overflow-x:auto;
  font:13.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;margin:12px 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 20px;margin:0;font-size:14px}
dt{color:var(--mute)}dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:56px;color:var(--mute);font-size:13.5px}
@media (max-width:560px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:9px}figure{padding:15px 14px 12px}}
@media print{body{background:#fff}figure,.tile,.card{break-inside:avoid}}
"""
).replace("FONT", FONT)
