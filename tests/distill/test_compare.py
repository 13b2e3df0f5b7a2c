"""`draftsmith compare`: what a sweep's page says of its runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill.compare import PAGE, TABLE, Compare, trainings
from distill.errors import UserError
from distill.report.curves import measured_unlike, rows, run_rows
from distill.runs import Run, grouped

SAMPLING = {"type": "SamplingParams", "temperature": 0.0}


def train(folder: Path, seed: int, taus: dict[int, float], **settings: Any) -> Run:
    """A run as far as the page reads it; one with no τ at step 20 is not finished."""
    folder.mkdir(parents=True)
    both = {
        "type": "Train",
        "objective": {"type": "ForwardKL"},
        "trainer": {"steps": 20},
        "sampling": SAMPLING,
        "num_held_out": 3,
        "draft_length": 4,
        "seed": seed,
    }
    (folder / "settings.json").write_text(json.dumps({"settings": both | settings}))
    lines: list[dict[str, float]] = []
    for step, tau in taus.items():
        if step:
            lines.append(
                {"step": step, "loss": 9 - tau, "tokens": 10 * step, "tokens_per_second": 50}
            )
        lines.append({"step": step, "heldout_tau": tau, "heldout_alpha": tau / 10})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if 20 in taus:
        (folder / "summary.json").write_text("{}")
        (folder / "drafter").mkdir()
        save_file({"w": torch.zeros(100, 200)}, folder / "drafter" / "model.safetensors")
    else:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 12, "lo')  # killed in the middle of a line
    return Run(folder)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    kl, tv = {"type": "ForwardKL"}, {"type": "TotalVariation <b>"}
    train(tmp_path / "2", 0, {0: 1.0, 10: 1.4, 20: 1.3}, objective=kl)
    train(tmp_path / "10", 1, {0: 1.0, 10: 1.1, 20: 1.2}, objective=kl)
    train(tmp_path / "1", 0, {0: 1.0, 10: 1.8}, objective=tv)
    other = tmp_path / "rows"
    other.mkdir()
    (other / "settings.json").write_text(json.dumps({"settings": {"type": "Generate"}}))
    return tmp_path


def test_trainings_are_found_and_go_by_number(sweep: Path) -> None:
    assert [path.name for path in trainings(sweep)] == ["1", "2", "10"]
    assert [path.name for path in trainings(sweep / "2")] == ["2"]


def test_seeds_share_a_line_and_the_best_comes_first(sweep: Path) -> None:
    groups = grouped([Run(path) for path in trainings(sweep)])
    _, first, second = rows(groups)
    name = "TotalVariation <b> (1 of 1 unfinished)"
    assert first == [name, "0", "1.800", "–", "0.180", "–", "100", "50"]
    assert second == ["ForwardKL", "0, 1", "1.300", "1.200–1.400", "0.130", "0.02 M", "200", "50"]
    _, _, best, last = run_rows(groups, sweep)
    assert best == ["2", "ForwardKL", "0", "20 of 20", "10", "1.400", "0.140", "7.7"]
    assert last == ["10", "ForwardKL", "1", "20 of 20", "20", "1.200", "0.120", "7.8"]


def test_a_class_is_told_without_the_classes_that_are_always_in_it(tmp_path: Path) -> None:
    source = {"type": "SeqKD", "rows": "a/rows"}
    data = [
        {"type": "Text", "prompts": {"type": "StandardLibraryPrompts"}},
        {"type": "OnPolicy", "share": 0.5, "source": source},
        {"type": "OnPolicy", "share": 1.0, "source": source},
        {"type": "OnPolicy", "share": 1.0, "source": {"type": "Text"}},
    ]
    runs = [train(tmp_path / str(n), 0, {0: 1.0}, data=one) for n, one in enumerate(data)]
    assert list(grouped(runs)) == [
        "Text",
        "share 0.5, SeqKD, OnPolicy",
        "share 1.0, SeqKD, OnPolicy",
        "share 1.0, Text, OnPolicy",
    ]
    assert list(grouped(runs[:2])) == ["Text", "OnPolicy"]


def test_a_comparison_that_is_none_is_said_to_be_none(sweep: Path) -> None:
    runs = [Run(path) for path in trainings(sweep)]
    assert not measured_unlike(runs)
    hot = train(sweep / "hot", 0, {0: 1.0}, sampling=SAMPLING | {"temperature": 1.0})
    assert measured_unlike([*runs, hot]) == ["sampling.temperature"]


def test_the_page_is_whole_escaped_and_fetches_nothing(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Compare(folder=sweep, title="a < b").run().read_text()
    assert page.startswith("<!doctype html>")
    assert "a &lt; b" in page
    assert "<b>" not in page
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert (sweep / TABLE).read_text() in capsys.readouterr().out
    assert (sweep / PAGE).is_file()


def test_a_folder_without_trainings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of draftsmith train"):
        Compare(folder=tmp_path).run()
