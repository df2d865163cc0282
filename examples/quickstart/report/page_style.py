"""Stylesheet of the report page: light and dark by the reader's setting, one column on narrow windows."""

from __future__ import annotations

from .legend import Arm

BASE = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2026;--soft:#5c6570;--rule:#e3e6ea;
--grid:#eceef1;--heat:24,100,171;--best:#fff4e6}
@media (prefers-color-scheme:dark){:root{--bg:#101317;--card:#181c22;--ink:#e8ebee;--soft:#9aa4af;
--rule:#2b313a;--grid:#252b33;--heat:77,171,247;--best:#2b2318}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);-webkit-text-size-adjust:100%;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:15px;font-weight:600;letter-spacing:.02em;color:var(--soft);margin:0 0 14px}
h2{font-size:19px;line-height:1.3;margin:0 0 4px}
h3{font-size:14px;margin:0 0 6px;font-weight:600}
p{margin:0}
.lead{font-size:clamp(22px,3.1vw,34px);line-height:1.24;font-weight:650;letter-spacing:-.015em;
max-width:27em;text-wrap:balance}
.lead b{color:var(--c);font-weight:inherit;overflow-wrap:anywhere}
.caveat{margin-top:12px;font-size:18px;color:var(--soft);max-width:46em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:28px 0 0}
.tile{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:14px 16px}
.tile b{display:block;font-size:26px;line-height:1.2;font-weight:650;font-variant-numeric:tabular-nums}
.tile span{font-size:13.5px;color:var(--soft);display:block;line-height:1.4;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--rule);border-radius:14px;padding:22px 22px 20px;
margin-top:20px}
.sub{color:var(--soft);font-size:14.5px;max-width:62em;margin-bottom:14px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:8px 10px;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
thead th{font-size:12.5px;line-height:1.3;font-weight:600;color:var(--soft);vertical-align:bottom;
border-bottom-width:2px}
th:first-child,td:first-child{text-align:left}
tbody th{white-space:normal;min-width:210px}
.heat tbody th{min-width:0;white-space:nowrap}
@media (min-width:681px){.heat tbody wbr{display:none}}
tbody th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
tr.teacher>*{color:var(--soft)}
tr.best>*{background:var(--best)}
td.top{font-weight:700}
.note{display:block;font-weight:400;color:var(--soft);font-size:12.5px;line-height:1.3}
.gone{color:var(--soft)}
.key{display:inline-block;width:11px;height:11px;border-radius:50%;background:var(--c);margin-right:8px}
.key.square{border-radius:2px}
.key.hollow{background:transparent;border:2.5px solid var(--c)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,310px),1fr));gap:24px 28px}
.panels.one{grid-template-columns:1fr}
.panels>*{min-width:0;display:flex;flex-direction:column}
.panels>*>svg{margin-top:auto}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,165px),1fr));gap:18px 26px}
.small.wider{grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr))}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:0 0 10px;padding:0;list-style:none}
.keys .key{margin-right:6px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:12px}
svg .label{fill:var(--ink);font-size:13px}
svg .axis-label{font-size:12.5px}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--soft);fill:none;opacity:.6}
.ref{stroke:var(--soft);stroke-dasharray:4 4;fill:none;opacity:.8}
.leader{stroke:var(--soft);fill:none;opacity:.5}
.line{stroke:var(--c);stroke-width:2.2;fill:none;stroke-linejoin:round;stroke-linecap:round}
.faint{stroke-width:1;opacity:.28}
.mark{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.mark.hollow{fill:var(--card);stroke:var(--c);stroke-width:2.5}
.bar{fill:var(--c)}
.narrow{display:none}
.heat{font-size:13.5px}
.heat th,.heat td{padding:6px 8px}
.heat thead th{white-space:normal;text-align:center}
.heat th:first-child{padding-left:0}
.heat td{text-align:center;border:2px solid var(--card);border-radius:6px}
.heat td[style]{background:rgba(var(--heat),var(--a))}
pre{margin:0;font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;background:var(--bg);border-radius:8px;padding:12px 14px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:14px;margin:14px 0 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
footer{color:var(--soft);font-size:13px;margin-top:22px}
@media (max-width:680px){
main{padding:24px 12px 40px}
section{padding:18px 14px 16px;border-radius:12px}
.wide{display:none}
.narrow{display:block}
.caveat{font-size:16px}
.tile b{font-size:22px}
.tiles{grid-template-columns:1fr 1fr}
th,td{padding:7px 8px}
.scroll th:first-child,.scroll td:first-child{position:sticky;left:0;background:var(--card);z-index:1;
min-width:150px;padding-left:0}
.scroll tr.best>:first-child{background:var(--best)}
.scroll .heat th:first-child{min-width:96px;white-space:normal}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:6px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""


def stylesheet(arms: dict[str, Arm]) -> str:
    """The page's CSS with one colour class per arm, `c0`, `c1`, ... in the order of `arms`."""
    light = "".join(f".c{i}{{--c:{arm.light}}}" for i, arm in enumerate(arms.values()))
    dark = "".join(f".c{i}{{--c:{arm.dark}}}" for i, arm in enumerate(arms.values()))
    return f"{BASE}{light}@media (prefers-color-scheme:dark){{{dark}}}"
