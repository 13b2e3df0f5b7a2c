"""Intervals with a known answer, figures by hand, and a page that tells who wrote what."""

import html
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from decode import StepRecord
from distill.report.bootstrap import Interval, ratio, ratio_of_ratios, resamples
from distill.report.by_kind import by_category, by_length
from distill.report.drafts import DrawnStep, tree
from distill.report.figures import AUTOREGRESSIVE, Measurement, Output, figures
from distill.report.html import Passage, marks, page
from distill.report.plots import all_plots
from distill.report.prediction import predict
from distill.report.tables import as_csv, as_json, markdown, step_times, verdict, verdicts


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    draws = resamples(60, 400, seed=1)
    covered = 0
    for _ in range(300):
        counts = rng.integers(5, 40, size=60).astype(float)
        hits = rng.binomial(counts.astype(int), 0.6).astype(float)
        interval = ratio(hits, counts, draws)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.90 <= covered / 300 <= 0.985


def test_rates_are_pooled_and_not_means_of_means() -> None:
    draws = resamples(2, 50, seed=0)
    assert ratio(np.array([1.0, 90.0]), np.array([1.0, 99.0]), draws).value == 0.91


def test_pairing_takes_the_difficulty_of_the_prompts_out() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.5, 4.0, size=50)
    ones = np.ones(50)
    draws = resamples(50, 1000, seed=0)
    paired = ratio_of_ratios(difficulty * 1.1, ones, difficulty, ones, draws)
    alone = ratio(difficulty * 1.1, ones, draws)
    assert abs(paired.value - 1.1) < 1e-9
    assert paired.high - paired.low < 1e-9 < 0.3 < alone.high - alone.low


def measurement(unit: int, mode: str, steps: list[list[int]], seconds: float) -> Measurement:
    behind = steps[1:]
    depth = max((s[0] for s in behind), default=0)
    tried = [min(s[1] + 1, s[0]) for s in behind]
    counts = {
        "num_steps": len(behind),
        "num_drafts": sum(s[0] > 0 for s in behind),
        "num_emitted_tokens": sum(s[2] for s in behind),
        "num_draft_tokens": sum(s[0] for s in behind),
        "num_tried_tokens": sum(tried),
        "num_accepted_tokens": sum(s[1] for s in behind),
        "num_tried_per_pos": [sum(t > i for t in tried) for i in range(depth)],
        "num_accepted_tokens_per_pos": [sum(s[1] > i for s in behind) for i in range(depth)],
        "expected_accepted": 0.0,
    }
    tokens = list(range(sum(s[2] for s in steps)))
    split = {"draft": seconds / 4, "verify": seconds / 2, "other": seconds / 4}
    return Measurement(unit, mode, 0, seconds, split, counts, [Output(f"p{unit}", tokens, steps)])


# 3 of 5 tried accepted, 6 tokens in 3 steps
WEAK = [[0, 0, 1, 1], [2, 0, 1, 0], [2, 1, 2, 0], [2, 2, 3, 1]]
STRONG = [[0, 0, 1, 1], [2, 2, 3, 1], [2, 2, 3, 1]]
ALL = [
    measurement(unit, mode, steps, seconds)
    for unit in range(4)
    for mode, steps, seconds in (
        (AUTOREGRESSIVE, [[0, 0, 1, 1]] * 7, 7.0),
        ("weak", WEAK, 5.0),
        ("strong", STRONG, 3.5),
    )
]


def both():  # type: ignore[no-untyped-def]
    ties = {"weak": (0, 0), "strong": (1, 1)}
    return figures(ALL, ["weak", "strong"], is_greedy=True, ties=ties, num_resamples=50, seed=0)


def test_figures_by_hand() -> None:
    weak, strong = both()
    assert weak.alpha.value == 3 / 5
    assert weak.draft_acceptance_rate.value == 3 / 6
    assert weak.block_efficiency.value == 6 / 3
    assert [round(x.value, 3) for x in weak.accepted_at] == [0.667, 0.333]
    assert [round(x.value, 3) for x in weak.accepted_at_conditional] == [0.667, 0.5]
    assert weak.speedup_over_autoregressive.value == 7 / 5
    assert weak.speedup_over_transformers is None
    assert weak.relative_block_efficiency is None
    assert strong.relative_block_efficiency is not None
    assert strong.relative_block_efficiency.value == 1.5
    assert (weak.verdict, strong.verdict) == ("the reference", "higher")
    assert weak.milliseconds["verify"] == 2.5 / 3 * 1000
    assert (weak.mismatches, strong.mismatches, strong.near_ties) == (0, 1, 1)


def test_predicted_speed_by_hand() -> None:
    times = step_times(ALL, [AUTOREGRESSIVE, "weak", "strong"], num_resamples=50, seed=0)
    found = predict(both(), times)
    weak = found["weak"]
    # An autoregressive step takes 7/6 s, half of it the forward; a weak one 5/3 s with two tokens.
    assert weak.draft_length == 2
    assert weak.c == pytest.approx((5 / 4 / 3 / 2) / (7 / 2 / 6))
    assert weak.v == pytest.approx((5 / 2 / 3) / (7 / 2 / 6))
    assert weak.ideal == pytest.approx(1.96 / (2 * weak.c + 1))  # 1 + 0.6 + 0.6²
    assert weak.with_costs == pytest.approx(1.96 * (7 / 6) / (5 / 3))
    assert weak.measured == pytest.approx(2 * (7 / 6) / (5 / 3))
    assert found["strong"].with_costs == pytest.approx(found["strong"].measured)  # α is 1
    tree = replace(both()[0], draft_acceptance_rate=Interval(0.1, 0.1, 0.1))  # 10 tokens, depth 2
    assert predict([tree], times) == {}


def test_tables_say_what_the_figures_say() -> None:
    text = markdown(both(), "greedy-identical")
    assert "| weak | 0.600 [0.600, 0.600] | 2.00 [2.00, 2.00] | – |" in text
    assert "+50.0 % [+50.0, +50.0]" in text
    assert "1 differ, 1 of them near ties" in text
    assert "strong,block_efficiency,3.0,3.0,3.0" in as_csv(both())


def test_every_token_has_one_writer() -> None:
    output = Output("p", list(range(7)), WEAK)
    assert "".join(mark.kind for mark in marks(output)) == "brar" + "aab"
    cut = Output("p", [1, 2, 3], [[0, 0, 1, 1], [5, 2, 2, 0]])  # EOS was the second accepted token
    assert "".join(mark.kind for mark in marks(cut)) == "baa"


def test_the_page_is_whole_escaped_and_fetches_nothing() -> None:
    drafters = both()
    tokens = ["<b>", "&", "\n", "x", "y", "z", "<script>"]
    passage = Passage("m:1", "if a < b & c:", tokens, Output("p", list(range(7)), WEAK))
    text = page(
        title="<T>",
        lead="lead",
        drafters=drafters,
        exactness="greedy-identical",
        plots=all_plots(drafters),
        passages={"weak": [passage], "strong": []},
        facts={"command": "draftsmith evaluate 'a<b'"},
    )
    assert "<script" not in text
    assert "if a &lt; b &amp; c:" in text
    assert "&lt;b&gt;" in text
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert text.count('class="a"') + text.count('class="a s"') == 4  # legend and three tokens
    assert "strong: τ is higher than weak's" in " ".join(verdicts(drafters, "greedy-identical"))


def test_a_page_shows_the_text_as_it_was_written() -> None:
    drafters = both()
    tokens = ["a <", " b &&\n", "\n", "\tc", "", '"d"', "é"]
    text = page(
        title="t",
        lead="l",
        drafters=drafters,
        exactness="greedy-identical",
        plots={},
        passages={"weak": [Passage("m", "x = '<'\n", tokens, Output("p", list(range(7)), WEAK))]},
        facts={},
    )
    (shown,) = re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == "x = '<'\n" + "".join(tokens)
    kinds = re.findall(r'<span class="([arb])(?: s)?" title="step (\d), token (\d)', shown)
    assert ["".join(kind) for kind in kinds] == ["b11", "r21", "a31", "r32", "a41", "a42", "b43"]


def test_step_times_have_intervals_and_add_up() -> None:
    times = step_times(ALL, [AUTOREGRESSIVE, "weak"], num_resamples=50, seed=0)
    assert times[AUTOREGRESSIVE]["step"].value == pytest.approx(7000 / 6)
    assert times["weak"]["verify"].value == pytest.approx(both()[0].milliseconds["verify"])
    assert "weak,milliseconds_per_step_step,1666.6" in as_csv(both(), times)


def test_what_is_undefined_is_null_in_json_and_said_in_words() -> None:
    alone = [m for m in ALL if m.mode != "weak"]
    alone += [measurement(unit, "weak", [[0, 0, 1, 1]], 1.0) for unit in range(4)]  # no step at all
    ties = {"weak": (0, 0), "strong": (2, 1)}
    drafters = figures(
        alone, ["weak", "strong"], is_greedy=True, ties=ties, num_resamples=50, seed=0
    )
    times = step_times(alone, ["weak", "strong"], num_resamples=50, seed=0)
    found = as_json(drafters, times)
    json.dumps(found, allow_nan=False)
    assert found["weak"]["alpha"] is None
    assert found["strong"]["against_first"]["block_efficiency"] == "not distinguishable"
    assert found["strong"]["speedup"] == found["strong"]["speedup_over_autoregressive"]
    assert "undefined" in markdown(drafters, "greedy-identical")
    assert "Wrong: 1 outputs of strong" in " ".join(verdicts(drafters, "greedy-identical"))
    lossy = " ".join(verdicts(drafters, "approximate"))
    assert "Lossy: 2 outputs of strong" in lossy
    assert "Wrong" not in lossy
    all_plots(drafters, times)


def test_higher_and_lower_are_said_only_of_clear_intervals() -> None:
    assert verdict(Interval(1.2, 1.1, 1.3)) == "higher"
    assert verdict(Interval(0.8, 0.7, 0.9)) == "lower"
    assert verdict(Interval(1.2, 0.9, 1.4)) == "not distinguishable"


def test_efficiency_by_length_by_hand() -> None:
    lengths = {f"p{unit}": 10 for unit in range(4)}
    table = by_length(ALL, ["weak", "strong"], lengths, num_resamples=50, seed=0)
    # Steps begin at 11, 12, 14 (weak) and 11, 14 (strong): quartiles 11, 11, 12, 14, 14.
    assert {name: list(row) for name, row in table.items()} == {
        "weak": ["11–11", "12–14"],
        "strong": ["11–11", "12–14"],
    }
    assert [interval.value for interval in table["weak"].values()] == [1.0, 2.5]
    assert [interval.value for interval in table["strong"].values()] == [3.0, 3.0]
    assert by_length(ALL, [], lengths, num_resamples=50, seed=0) == {}


def test_efficiency_by_category_by_hand() -> None:
    kinds = {"p0": "code", "p1": "code", "p2": "prose", "p3": "prose"}
    table = by_category(ALL, ["weak", "strong"], kinds, num_resamples=50, seed=0)
    assert {name: list(row) for name, row in table.items()} == {
        "weak": ["code", "prose"],
        "strong": ["code", "prose"],
    }
    steps = {
        kind: [
            emitted
            for m in ALL
            if m.mode == "weak" and m.repeat == 0 and kinds[m.outputs[0].prompt_id] == kind
            for _, _, emitted, _ in m.outputs[0].steps[1:]
        ]
        for kind in ("code", "prose")
    }
    for kind, emitted in steps.items():
        assert table["weak"][kind].value == sum(emitted) / len(emitted)
    assert by_category(ALL, ["weak"], dict.fromkeys(kinds, "code"), num_resamples=50, seed=0) == {}


def test_a_draft_is_drawn_with_what_became_of_it() -> None:
    record = StepRecord(
        request_id="a",
        step=2,
        length=7,
        tokens=[1, 2, 3, 4, 5],
        parents=[-1, 0, 0, 1, 1],
        path=[1],
        emitted=[2, 9],
        seconds={"draft": 0.001},
    )
    picture = tree(DrawnStep(record, ["a", " b", "<c>", "d\n", "a long, long token"], "own"))
    found = ElementTree.fromstring(picture).find("svg")
    assert found is not None
    boxes = found.findall("g")
    assert [box.get("class") for box in boxes] == ["", "a", "", "", "", "r"]
    labels = [box.findtext("text") for box in boxes]
    assert labels == ["a", "·b", "<c>", "d⏎", "a·long,·l…", "own"]
    at = [(int(box.find("rect").get("x")), int(box.find("rect").get("y"))) for box in boxes]  # type: ignore[union-attr,arg-type]
    assert len(set(at)) == len(at)
    assert at[1][0] == at[2][0] > at[0][0]  # siblings share a column
    assert at[1][1] == at[0][1] < at[3][1] + 1  # a first child stands beside its parent
    assert len(found.findall("path")) == 5
    whole = DrawnStep(StepRecord("a", 2, 7, [1, 2], [-1, 0], [1], [2, 9], {}), ["a", "b"], "own")
    assert 'class="b"' in tree(whole)
    cut = DrawnStep(StepRecord("a", 2, 7, [1, 2], [-1, 0], [1], [2], {}), ["a", "b"], "")
    assert 'class="b"' not in tree(cut)
