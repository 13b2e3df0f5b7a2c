"""One self-contained page: table, plots, how it was measured, and who wrote which token."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.report.figures import DrafterFigures, Output
from distill.report.tables import HEADER, change, table_rows

ALT = {
    "block_efficiency": "Block efficiency and speedup of each drafter",
    "acceptance_by_position": "Acceptance by position in the draft",
    "time_split": "Time of a step by phase",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --line: #d9dce1; --soft: #667;
  --accepted: #b9e4c9; --recovered: #ffd0b0; --bonus: #bcd9f7; --mark: #111; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --paper: #16181c; --line: #383c44;
  --soft: #9aa; --accepted: #1d5a36; --recovered: #7a3f16; --bonus: #1d4a78; --mark: #fff; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.lead { color: var(--soft); margin: 0 0 1.2rem; }
.verdict { border-left: 4px solid #009e73; padding: .4rem .9rem; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td { white-space: nowrap; }
td:last-child { white-space: normal; } td.wrap { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; margin: .4rem 0; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { display: inline-block; padding: .3rem .8rem; border: 1px solid var(--line);
  border-radius: 999px; margin: 0 .3rem .5rem 0; cursor: pointer; }
.tabs > input:checked + label { background: var(--ink); color: var(--paper); }
.tabs > input:focus-visible + label { outline: 3px solid #56b4e9; }
.tabs > .panel { display: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.75 ui-monospace, monospace;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: .5rem 0 1.2rem; }
.p { color: var(--soft); } .a { background: var(--accepted); } .r { background: var(--recovered); }
.b { background: var(--bonus); } .s { border-left: 2px solid var(--mark); }
.a, .r, .b { border-radius: 2px; color: var(--ink); }
.legend span { padding: .1rem .5rem; margin-right: .5rem; }
@media print { body { max-width: none; } .tabs > .panel { display: block !important; }
  * { print-color-adjust: exact; } }
"""
KINDS = {
    "a": "drafted and accepted",
    "r": "recovered: the target's token after a rejection",
    "b": "bonus: the target's token behind a draft that was accepted whole",
}


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt and one drafter's output, as texts of tokens.

    Attributes:
        source: where the prompt comes from.
        prompt: its text.
        tokens: texts of the output tokens.
        output: whose steps say who wrote them.
    """

    source: str
    prompt: str
    tokens: list[str]
    output: Output


@dataclass(frozen=True, slots=True)
class Mark:
    """Who wrote a token.

    Attributes:
        kind: "a" accepted, "r" recovered, "b" bonus.
        step: target forward, counted from 1; the prompt's own is the first.
        position: place in the step's emitted tokens, from 1.
        drafted: tokens in the step's draft.
        accepted: of these.
    """

    kind: str
    step: int
    position: int
    drafted: int
    accepted: int


def marks(output: Output) -> list[Mark]:
    """One mark for each output token."""
    return [
        Mark(
            "a" if place < accepted else "b" if accepted == drafted else "r",
            number,
            place + 1,
            drafted,
            accepted,
        )
        for number, (drafted, accepted, emitted) in enumerate(output.steps, start=1)
        for place in range(emitted)
    ]


def page(
    *,
    title: str,
    lead: str,
    drafters: Sequence[DrafterFigures],
    exactness: str,
    plots: Mapping[str, bytes],
    passages: Mapping[str, Sequence[Passage]],
    facts: Mapping[str, Any],
) -> str:
    """The whole page; nothing in it is fetched from anywhere."""
    tabs = _tabs({name: "".join(map(_passage, rows)) for name, rows in passages.items()})
    legend = "".join(f'<span class="{kind}">{text}</span>' for kind, text in KINDS.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
<div class="verdict">{"<br>".join(html.escape(line) for line in verdicts(drafters))}</div>
<div class="scroll">{_table([HEADER, *table_rows(drafters, exactness)])}</div>
<p class="lead">Brackets hold 95 % bootstrap intervals over prompts; comparisons are paired by
prompt. α: accepted / tried draft tokens. τ: tokens per target pass, the target's own included.</p>
<h2>Plots</h2>
{"".join(_image(name, data) for name, data in plots.items())}
<h2>Who wrote which token</h2>
<p class="legend"><span class="p">prompt</span>{legend}<span class="s">begin of a step</span></p>
{tabs}
<h2>How it was measured</h2>
<div class="scroll">{_facts(facts)}</div>
</body></html>
"""


def verdicts(drafters: Sequence[DrafterFigures]) -> list[str]:
    """The outcome in plain words, one sentence a drafter."""
    first = drafters[0]
    lines = [
        f"{d.name}: τ is {d.verdict} than {first.name}'s ({change(d.relative_block_efficiency)})."
        if d.verdict in ("higher", "lower")
        else f"{d.name}: τ is not distinguishable from {first.name}'s "
        f"({change(d.relative_block_efficiency)})."
        for d in drafters[1:]
    ]
    best = max(drafters, key=lambda d: d.speedup.value)
    speed = best.speedup
    word = (
        "faster" if speed.low > 1 else "slower" if speed.high < 1 else "neither faster nor slower"
    )
    lines.append(
        f"The fastest, {best.name}, makes decoding {speed.value:.2f} times as fast "
        f"[{speed.low:.2f}, {speed.high:.2f}]: {word} than without a drafter on this machine."
    )
    return lines


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th>{html.escape(name)}</th><td class="wrap">{html.escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _image(name: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{ALT[name]}" src="data:image/png;base64,{encoded}">'


def _tabs(panels: Mapping[str, str]) -> str:
    """A selector without scripts: radio buttons and a rule for each."""
    rules, controls, bodies = [], [], []
    for index, (name, body) in enumerate(panels.items()):
        checked = " checked" if index == 0 else ""
        rules.append(f"#tab{index}:checked ~ #panel{index} {{ display: block; }}")
        controls.append(
            f'<input type="radio" name="tab" id="tab{index}"{checked}>'
            f'<label for="tab{index}">{html.escape(name)}</label>'
        )
        bodies.append(f'<div class="panel" id="panel{index}">{body}</div>')
    style = f"<style>{' '.join(rules)}</style>"
    return f'{style}<div class="tabs">{"".join(controls)}{"".join(bodies)}</div>'


def _passage(passage: Passage) -> str:
    spans = []
    for text, mark in zip(passage.tokens, marks(passage.output), strict=True):
        begins = " s" if mark.position == 1 else ""
        title = f"step {mark.step}: {mark.accepted} of {mark.drafted} drafted tokens accepted"
        shown = html.escape(text).replace("\n", "⏎\n")
        spans.append(f'<span class="{mark.kind}{begins}" title="{title}">{shown}</span>')
    head = f"<p>{html.escape(passage.source)}</p>"
    return f'{head}<pre><span class="p">{html.escape(passage.prompt)}</span>{"".join(spans)}</pre>'
