"""The streams of the standard library, and their replay without a model."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))

import bench_streams
from bench_streams import FAULTS, replay, report_of

from decode.drafters import NoDrafter, RestDrafter, SuffixDrafter


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_reported_as_python_does_and_again_the_same(fault: str) -> None:
    for number in (1, 249):
        line = fault.format(word="case", number=number)
        report = report_of(line)
        assert report.startswith("Traceback (most recent call last):\n")
        assert Path(bench_streams.__file__).name not in report
        assert report_of(line) == report
    with pytest.raises(RuntimeError, match="does not fail"):
        report_of("import json")


def test_a_replay_counts_what_the_recorded_text_goes_along_with() -> None:
    text = list(range(1, 41))
    pairs = [([90], text), ([91, 1, 2], [*text[2:30], 99])]
    assert replay(NoDrafter(), pairs) == [(40, 40, 0), (29, 29, 0)]
    first, (tokens, steps, drafted) = replay(SuffixDrafter(), pairs)
    assert first == (40, 40, 0)
    assert tokens == 29
    assert steps < 8
    assert tokens - steps <= drafted
    (_, (_, steps, drafted)) = replay(RestDrafter(length=9, size=9), pairs)
    # Each step brings nine tokens of the text and one more; behind the last it has nothing to say.
    assert steps == 3
    assert drafted == 9 + 9 + 9
