"""Every way of decoding on every prompt, interleaved, each measurement on disk as it comes."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from operator import add
from pathlib import Path
from typing import Protocol, runtime_checkable

from decode import GenerationResult
from distill.progress import Progress
from distill.prompts import Prompt
from distill.report.figures import Measurement, Output

Mode = Callable[[Sequence[Prompt]], tuple[list[GenerationResult], float]]


@runtime_checkable
class Learner(Protocol):
    """A drafter that drafts better for what it has seen.

    One with a method `learn(output)` has seen all that it can with the output; of another what was
    measured before a kill is decoded again.
    """

    def forget(self) -> None:
        """Begin anew."""
        ...


def measure(
    modes: Mapping[str, Mode],
    units: Sequence[Sequence[Prompt]],
    repeats: int,
    journal: Path,
    learners: Mapping[str, Learner],
    past: Sequence[Sequence[int]] = (),
) -> list[Measurement]:
    """Every mode on every unit; each line of the journal is on disk as it comes.

    Args:
        modes: by name; what is run and how long it took.
        units: prompts that are decoded together.
        repeats: timings of each unit.
        journal: what is in it is not measured again.
        learners: modes whose drafter learns: it has seen the units before, of the same repeat.
        past: outputs that they have seen before the first unit.
    """
    done = read_journal(journal)
    measured = {(m.unit, m.mode, m.repeat): m for m in done}
    total = len(units) * len(modes) * repeats
    if len(measured) < total:
        for run in modes.values():  # what is slow only once is not measured
            run(units[0])
    with journal.open("a") as file, Progress(total, unit="runs", label="evaluate") as progress:
        progress.skip(len(measured))
        for repeat in range(repeats):
            for drafter in learners.values():
                begin_anew(drafter, past)
            for index, unit in enumerate(units):
                # No mode always comes first, or behind the same other.
                names = list(modes)
                shift = (index + repeat) % len(names)
                for name in names[shift:] + names[:shift]:
                    if known := measured.get((index, name, repeat)):
                        if learner := learners.get(name):
                            _teach(learner, known, modes[name], unit)
                        continue
                    results, seconds = modes[name](unit)
                    done.append(_measurement(index, name, repeat, results, seconds))
                    file.write(json.dumps(asdict(done[-1])) + "\n")
                    file.flush()
                    progress.advance(1)
        os.fsync(file.fileno())
    return done


def begin_anew(learner: Learner, past: Sequence[Sequence[int]]) -> None:
    """Let a drafter know these outputs and nothing else."""
    learner.forget()
    if learn := getattr(learner, "learn", None):
        for output in past:
            learn(output)


def _teach(learner: Learner, known: Measurement, mode: Mode, unit: Sequence[Prompt]) -> None:
    """Let a drafter see what it saw when this was measured."""
    learn = getattr(learner, "learn", None)
    if learn is None:
        mode(unit)
        return
    for output in known.outputs:
        learn(output.tokens)


def read_journal(path: Path) -> list[Measurement]:
    """The measurements on disk; a last line that a kill cut short is dropped from the file too."""
    if not path.is_file():
        return []
    found, whole = [], 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            record["outputs"] = [Output(**output) for output in record["outputs"]]
            found.append(Measurement(**record))
            whole += len(line)
    os.truncate(path, whole)
    return found


def _measurement(
    unit: int, mode: str, repeat: int, results: Sequence[GenerationResult], seconds: float
) -> Measurement:
    stats = reduce(add, (result.stats for result in results))
    counts = asdict(stats)
    split = counts.pop("seconds")
    outputs = [
        Output(
            result.request_id,
            result.tokens,
            [
                [s.num_drafted, s.num_accepted, s.num_emitted, int(s.reached_leaf)]
                for s in result.steps
            ],
        )
        for result in results
    ]
    return Measurement(unit, mode, repeat, seconds, split, counts, outputs)
