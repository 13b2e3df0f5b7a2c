"""What pages are made of; nothing in them is fetched from anywhere."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d9dce1; --soft: #596070;
  --accepted: #c3e2fa; --recovered: #ffd09c; --bonus: #b4e3cd; --mark: #333; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #16181c; --line: #383c44;
  --soft: #a3adb8; --accepted: #12466f; --recovered: #7d4206; --bonus: #0d5a3f; --mark: #ddd; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
.lead { color: var(--soft); margin: 0 0 1.2rem; }
.verdict { border-left: 4px solid #009e73; padding: .4rem .9rem; margin: 1rem 0; }
.scroll { overflow-x: auto; margin-bottom: .6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; } td { white-space: nowrap; }
td:last-child { white-space: normal; } td.wrap { overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  margin: .8rem 0; }
summary { cursor: pointer; margin: 1rem 0 .6rem; font-weight: 600; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { display: inline-block; padding: .3rem .8rem; border: 1px solid var(--line);
  border-radius: 999px; margin: 0 .3rem .5rem 0; cursor: pointer; }
.tabs > input:checked + label { background: var(--ink); color: var(--paper); }
.tabs > input:focus-visible + label { outline: 3px solid #56b4e9; }
.tabs > .panel { display: none; } .panel > h3.name { display: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.85 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: .5rem 0 1.2rem; }
.p { color: var(--soft); }
.a, .r, .b { border-radius: 2px; color: var(--ink); padding: .1em 0; }
.a { background: var(--accepted); }
.r { background: var(--recovered); border-bottom: 2px dotted var(--mark); }
.b { background: var(--bonus); border-bottom: 2px solid var(--mark); }
.s { box-shadow: inset 2px 0 var(--mark); } .s:not(:empty) { padding-left: 3px; }
i.n::before { content: "⏎"; opacity: .45; font-style: normal; }
.legend span { display: inline-block; padding: .1rem .5rem; margin: 0 .5rem .3rem 0; }
@media print { body { max-width: none; font-size: 11px; padding: 0; } pre { font-size: 9px; }
  .tabs > input, .tabs > label { display: none; } img, tr { break-inside: avoid; }
  .tabs > .panel, .panel > h3.name { display: block !important; } .scroll { overflow: visible; }
  td, th { white-space: normal; padding: .2rem .3rem; } * { print-color-adjust: exact; } }
"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    rows = "".join(
        f'<tr><th>{html.escape(name)}</th><td class="wrap">{html.escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def image(alt: str, data: bytes) -> str:
    """A PNG inside the page."""
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'
