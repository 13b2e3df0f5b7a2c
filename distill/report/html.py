"""One self-contained page: table, plots, how it was measured, and who wrote which token."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from decode import StepRecord
from distill.prompts import Prompt
from distill.report.bootstrap import Interval
from distill.report.drafts import STYLE as DRAFT_STYLE
from distill.report.drafts import DrawnStep, drawn
from distill.report.figures import DrafterFigures, Measurement, Output
from distill.report.parts import STYLE, facts_table, image, table
from distill.report.prediction import Prediction
from distill.report.tables import (
    HEADER,
    NO_TIMES,
    StepTimes,
    all_figures,
    cell,
    table_rows,
    verdicts,
)
from distill.target import LoadedTarget

ALT = {
    "block_efficiency": "Block efficiency and speedup of each drafter",
    "acceptance_by_position": "Acceptance by position in the draft",
    "time_split": "Time of a step by phase",
}
KINDS = {
    "a": "drafted and accepted",
    "r": "recovered: the target's token after a rejection",
    "b": "bonus: the target's token behind a draft that was accepted whole, or behind none",
}
NUM_PASSAGES = 3
NOTHING: Mapping[str, Mapping[str, Interval]] = {}
NONE_PREDICTED: Mapping[str, Prediction] = {}
ANCHOR = 8  # tokens of the prompt that are decoded along: some tokenizers strip what comes first
PROMPT_SHOWN = 1500  # characters: its end, next to which the output stands


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt and one drafter's output, as texts of tokens.

    Attributes:
        source: where the prompt comes from.
        prompt: its text.
        tokens: texts of the output tokens.
        output: whose steps say who wrote them.
        steps: its drafts, where they were traced.
    """

    source: str
    prompt: str
    tokens: list[str]
    output: Output
    steps: list[DrawnStep] = field(default_factory=list)


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
            "a" if place < accepted else "b" if reached_leaf else "r",
            number,
            place + 1,
            drafted,
            accepted,
        )
        for number, (drafted, accepted, emitted, reached_leaf) in enumerate(output.steps, start=1)
        for place in range(emitted)
    ]


def passages_of(
    target: LoadedTarget,
    prompts: Sequence[Prompt],
    measurements: Sequence[Measurement],
    mode: str,
    records: Sequence[StepRecord] = (),
) -> list[Passage]:
    """What one mode made of the first few prompts; `records` are its steps, where traced."""
    outputs = {
        output.prompt_id: output
        for m in measurements
        if m.mode == mode and m.repeat == 0
        for output in m.outputs
    }
    return [
        Passage(
            p.source,
            p.text,
            token_texts(target, output.tokens, p.ids[-ANCHOR:]),
            output,
            [_drawn_step(target, record) for record in records if record.request_id == p.id],
        )
        for p in prompts[:NUM_PASSAGES]
        for output in [outputs[p.id]]
    ]


def _drawn_step(target: LoadedTarget, record: StepRecord) -> DrawnStep:
    texts = [target.tokenizer.decode([token]) for token in record.tokens]
    was_cut = len(record.emitted) <= len(record.path)
    last = "" if was_cut else target.tokenizer.decode([record.emitted[-1]])
    return DrawnStep(record, texts, last)


def token_texts(
    target: LoadedTarget, tokens: Sequence[int], prompt: Sequence[int] = ()
) -> list[str]:
    """The text each token adds behind `prompt`; bytes of one character show with its last token."""

    def decoded(count: int) -> str:
        text: str = target.tokenizer.decode(
            [*prompt, *tokens[:count]], clean_up_tokenization_spaces=False
        )
        return text

    texts, before = [], decoded(0)
    for count in range(1, len(tokens) + 1):
        now = decoded(count)
        if now.endswith("�") and count < len(tokens):
            texts.append("")
        else:
            texts.append(now[len(before) :])
            before = now
    return texts


def page(
    *,
    title: str,
    lead: str,
    drafters: Sequence[DrafterFigures],
    exactness: str,
    plots: Mapping[str, bytes],
    passages: Mapping[str, Sequence[Passage]],
    facts: Mapping[str, Any],
    times: Mapping[str, StepTimes] = NO_TIMES,
    lengths: Mapping[str, Mapping[str, Interval]] = NOTHING,
    categories: Mapping[str, Mapping[str, Interval]] = NOTHING,
    predictions: Mapping[str, Prediction] = NONE_PREDICTED,
) -> str:
    """The whole page; nothing in it is fetched from anywhere."""
    legend = "".join(f'<span class="{kind}">{text}</span>' for kind, text in KINDS.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}{DRAFT_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
<div class="verdict">{"<br>".join(map(html.escape, verdicts(drafters, exactness)))}</div>
<div class="scroll">{table([HEADER, *table_rows(drafters, exactness)])}</div>
<p class="lead">Brackets hold 95 % bootstrap intervals over prompts; comparisons are paired by
prompt. α: accepted / tried draft tokens. τ: tokens per target pass, the target's own included.
Of the two speedups, quote the smaller.</p>
<h2>Plots</h2>
{"".join(image(ALT[name], data) for name, data in plots.items())}
{_predicted(predictions)}
{_by_kind("length of the text before the step", "tokens of prompt and output", lengths)}
{_by_kind("category of the prompt", "category", categories)}
<h2>Who wrote which token</h2>
<p class="legend"><span class="p">prompt</span>{legend}<span class="s">begin of a step</span></p>
{_tabs({name: "".join(map(_passage, rows)) for name, rows in passages.items()})}
<h2>How it was measured</h2>
<div class="scroll">{facts_table(facts)}</div>
<details><summary>All figures</summary>
<div class="scroll">{_figures(drafters, times)}</div></details>
</body></html>
"""


def _figures(drafters: Sequence[DrafterFigures], times: Mapping[str, StepTimes]) -> str:
    found = {d.name: all_figures(d, times.get(d.name, {})) for d in drafters}
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    rows = [[name, *(cell(figures.get(name), 3) for figures in found.values())] for name in names]
    return table([["figure", *found], *rows])


def _predicted(predictions: Mapping[str, Prediction]) -> str:
    if not predictions:
        return ""
    head = ["", "draft length", "c", "v", "theorem", "with the costs", "measured"]
    rows = [
        [name, str(p.draft_length)]
        + [f"{figure:.2f}" for figure in (p.c, p.v, p.ideal, p.with_costs, p.measured)]
        for name, p in predictions.items()
    ]
    return f"""<h2>Predicted and measured speed</h2>
<div class="scroll">{table([head, *rows])}</div>
<p class="lead">Over autoregressive steps. Theorem: (1 - α^(γ+1)) / ((1 - α)(γ c + 1)), Leviathan et
al. 2023, which takes verification to cost what one token does (v = 1) and acceptance to be alike
everywhere. With the costs: the same tokens over the seconds that steps really took. From there to
what was measured only the second assumption is missing.</p>"""


def _by_kind(of_what: str, corner: str, by: Mapping[str, Mapping[str, Interval]]) -> str:
    if not by:
        return ""
    kinds = list(next(iter(by.values())))
    rows = [[name, *(cell(found[kind]) for kind in kinds)] for name, found in by.items()]
    return f'<h2>τ by {of_what}</h2><div class="scroll">{table([[corner, *kinds], *rows])}</div>'


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
        heading = f'<h3 class="name">{html.escape(name)}</h3>'
        bodies.append(f'<div class="panel" id="panel{index}">{heading}{body}</div>')
    style = f"<style>{' '.join(rules)}</style>"
    return f'{style}<div class="tabs">{"".join(controls)}{"".join(bodies)}</div>'


def _passage(passage: Passage) -> str:
    written = marks(passage.output)
    spans = []
    for text, mark in zip(passage.tokens, written, strict=True):
        begins = " s" if mark.position == 1 else ""
        title = f"step {mark.step}, token {mark.position}: " + (
            f"{mark.accepted} of {mark.drafted} drafted tokens accepted"
            if mark.drafted
            else "the target alone, nothing drafted"
        )
        spans.append(f'<span class="{mark.kind}{begins}" title="{title}">{_shown(text)}</span>')
    kinds = [mark.kind for mark in written]
    head = (
        f"{passage.source}: {len(written)} tokens in {len(passage.output.steps)} target passes; "
        f"{kinds.count('a')} accepted, {kinds.count('r')} recovered, {kinds.count('b')} bonus"
    )
    prompt = passage.prompt
    if len(prompt) > PROMPT_SHOWN:
        prompt = "… " + prompt[-PROMPT_SHOWN:]
    return (
        f"<p>{html.escape(head)}</p>"
        f'<pre><span class="p">{html.escape(prompt)}</span>{"".join(spans)}</pre>'
        + _drafts(passage.steps)
    )


def _drafts(steps: Sequence[DrawnStep]) -> str:
    """The drafts of a passage, folded away."""
    if not steps:
        return ""
    return (
        f"<details><summary>The {len(steps)} drafts of this output</summary>"
        f"{''.join(map(drawn, steps))}</details>"
    )


def _shown(text: str) -> str:
    """Escaped, with a sign at line ends that is drawn but not copied."""
    return html.escape(text).replace("\n", '<i class="n"></i>\n')
