"""Drafts as pictures: the tree of every step, what was accepted of it, and what was emitted."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from decode import StepRecord

COLUMN, ROW, MARGIN = 96, 22, 6  # pixels per depth, per leaf, around
SHOWN = 10  # characters of a token
STYLE = """
svg.draft { display: block; margin: .2rem 0 .8rem; font: 12px ui-monospace, monospace; }
svg.draft path { fill: none; stroke: var(--line); } svg.draft path.on { stroke: var(--mark); }
svg.draft rect { fill: none; stroke: var(--line); rx: 3px; } svg.draft text { fill: var(--ink); }
svg.draft .a rect { fill: var(--accepted); stroke: none; }
svg.draft .r rect { fill: var(--recovered); stroke: none; }
svg.draft .b rect { fill: var(--bonus); stroke: none; }
"""


@dataclass(frozen=True, slots=True)
class DrawnStep:
    """A step, with the text of each token.

    Attributes:
        record: of the step.
        texts: of the draft's nodes.
        last: of the target's own token, "" where the output was cut before it.
    """

    record: StepRecord
    texts: list[str]
    last: str


def drawn(step: DrawnStep) -> str:
    """One step: a line of figures and the tree as SVG."""
    record = step.record
    accepted, drafted = len(record.path), len(record.tokens) - 1
    times = ", ".join(f"{name} {1e3 * spent:.2f} ms" for name, spent in record.seconds.items())
    head = f"step {record.step}: {accepted} of {drafted} accepted, {len(record.emitted)} emitted"
    return f"<p>{head}; {times}</p>{tree(step)}"


def tree(step: DrawnStep) -> str:
    """The draft as SVG: the root left, every leaf on a line of its own."""
    record = step.record
    nodes = [(parent, text) for parent, text in zip(record.parents, step.texts, strict=True)]
    kinds = ["a" if node in record.path else "" for node in range(len(nodes))]
    if step.last:
        end = record.path[-1] if record.path else 0
        is_leaf = all(parent != end for parent, _ in nodes)
        nodes.append((end, step.last))
        kinds.append("b" if is_leaf else "r")
    places = _places([parent for parent, _ in nodes])
    width = MARGIN * 2 + COLUMN * (1 + max(column for column, _ in places))
    height = MARGIN * 2 + ROW * (1 + max(row for _, row in places))
    parts = []
    for node, (parent, _) in enumerate(nodes):
        if parent >= 0:
            (x0, y0), (x1, y1) = _middle(places[parent]), _middle(places[node])
            x0, x1 = x0 + COLUMN - 14, x1
            on = ' class="on"' if kinds[node] else ""
            bend = (x0 + x1) // 2
            parts.append(f'<path{on} d="M{x0} {y0}C{bend} {y0} {bend} {y1} {x1} {y1}"/>')
    for (_, text), kind, place in zip(nodes, kinds, places, strict=True):
        x, y = _middle(place)
        shown = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
        label = html.escape(shown.replace("\n", "⏎").replace(" ", "·"))
        parts.append(
            f'<g class="{kind}"><title>{html.escape(repr(text))}</title>'
            f'<rect x="{x}" y="{y - 9}" width="{COLUMN - 14}" height="18"/>'
            f'<text x="{x + 4}" y="{y + 4}">{label}</text></g>'
        )
    return (
        f'<div class="scroll"><svg class="draft" width="{width}" height="{height}">'
        f"{''.join(parts)}</svg></div>"
    )


def _places(parents: Sequence[int]) -> list[tuple[int, int]]:
    """Column and row of each node: a first child stands beside its parent, others below."""
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    places = [(0, 0)] * len(parents)
    waiting, row, begins = [(0, 0)], -1, True
    while waiting:  # depth first; a node begins a new row unless it is a first child
        node, column = waiting.pop()
        first = parents[node] >= 0 and children[parents[node]][0] == node
        if begins or not first:
            row += 1
        begins = False
        places[node] = column, row
        waiting += [(child, column + 1) for child in reversed(children[node])]
    return places


def _middle(place: tuple[int, int]) -> tuple[int, int]:
    """Left edge and middle of a node."""
    column, row = place
    return MARGIN + COLUMN * column, MARGIN + ROW * row + ROW // 2
