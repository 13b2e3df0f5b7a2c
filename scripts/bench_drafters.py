"""Compare trained drafters: a table of what was trained, over seeds, at temperature 0 and 1.

    draftsmith train --multirun data.rows=ROWS drafter=lm,medusa objective=forward_kl,lk_lambda \\
        seed=0,1,2 output=runs/grid
    python scripts/bench_drafters.py runs/grid/* --out runs/grid/table

Runs that differ in nothing but the seed share a row, named by the settings in which rows differ.
All drafters continue the same held-out prompts, --batch at a time, in chains, beside our loop
without a drafter. Every output's counts are on disk as they come, and a second call goes on from
there: it times the loop without a drafter again, and an output's time is only ever held against
that loop's on the same prompts in the same call. A run that trained its target too is measured with
that target, its speed is over the plain loop on that target, and its τ is not compared with the
others'.

With --last the weights of the last step are measured, not those of the step with the best τ on
training's few held-out prompts: where a method makes drafters worse, the table then says so.

α, τ, speed and the change of τ against the first row carry 95 % intervals of a bootstrap over
prompts and over seeds at once. Few seeds make them too narrow: three, drawn with replacement, show
two thirds of the variance between seeds; the lowest and highest τ of the seeds stand beside.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from decode import (
    Drafter,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    lay_out_for_decoding,
)
from decode.drafters import NoDrafter, load_drafter
from distill.drafter_folder import check_target, read_description, weights_hash
from distill.errors import UserError
from distill.progress import Progress
from distill.prompts import Prompt, StandardLibraryPrompts
from distill.report.bootstrap import Interval, divide, interval, resamples
from distill.run_folder import canonical, content_hash, describe, differing_keys
from distill.runs import PLAIN, Run, at_last_step, rows_of
from distill.target import LoadedTarget, TargetSettings

TEMPERATURES = (0.0, 1.0)
COUNTS = ("emitted", "steps", "accepted", "tried", "tokens", "seconds")
RESAMPLES = 2000
WARM_UP_TOKENS = 16
Array = npt.NDArray[np.float64]
Counts = Mapping[str, float]  # COUNTS -> of one output


@dataclass(frozen=True)
class Mode:
    """A way to decode.

    Attributes:
        name: in the journal.
        weights: hash of what it decodes with.
        plain: name of the mode that its time is held against.
        target: what it decodes for.
        drafter: what drafts.
    """

    name: str
    weights: str
    plain: str
    target: Target
    drafter: Drafter


@dataclass(frozen=True)
class Output:
    """A line of the journal: one output of a mode, and the call of this script that made it."""

    session: int
    mode: str
    weights: str
    temperature: float
    prompt: str
    counts: dict[str, float]


@dataclass(frozen=True)
class Pair:
    """Counts of an output, and of the plain loop's on the same prompt in the same session."""

    own: Counts
    plain: Counts


Pairs = dict[tuple[str, float, str], Pair]  # (run, temperature, prompt) ->


def modes_of(
    runs: Sequence[Run], given: LoadedTarget, draft_length: int, batch: int
) -> dict[str, Mode]:
    """Every run's drafter, and the plain loop on every target.

    Raises:
        UserError: a drafter was made for another target.
    """

    def plain(name: str, target: LoadedTarget) -> Mode:
        lay_out_for_decoding(target.model)
        wrapped = Target(target.model, max_batch_size=batch)
        return Mode(name, target.fingerprint, name, wrapped, NoDrafter())

    targets = {PLAIN: given}
    modes = {PLAIN: plain(PLAIN, given)}
    for run in runs:
        if run.plain not in modes:
            targets[run.plain] = TargetSettings(path=str(run.own_target), device="cpu").load()
            modes[run.plain] = plain(run.plain, targets[run.plain])
        check_target(read_description(run.drafter), run.drafter, targets[run.plain])
        wrapped = modes[run.plain].target
        drafter = load_drafter(
            run.drafter,
            target=wrapped,
            draft=draft_length,
            tokenizer=targets[run.plain].tokenizer,
        )
        modes[run.name] = Mode(run.name, run.weights(), run.plain, wrapped, drafter)
    return modes


def measure(
    modes: Mapping[str, Mode],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch: int,
    journal: Path,
) -> Pairs:
    """Every drafter on every prompt, at both temperatures, as far as it is not in the journal."""
    outputs = read(journal)
    check_weights(outputs, {mode.name: mode.weights for mode in modes.values()}, journal)
    plain_of = {mode.name: mode.plain for mode in modes.values() if mode.name != mode.plain}
    done = paired(outputs, plain_of)
    session = 1 + max((output.session for output in outputs), default=0)
    work: list[tuple[Sequence[Prompt], float, list[Mode]]] = []
    for number, first in enumerate(range(0, len(prompts), batch)):
        together = prompts[first : first + batch]
        for temperature in TEMPERATURES:
            left = [
                name
                for name in plain_of
                if any((name, temperature, prompt.id) not in done for prompt in together)
            ]
            needed = {plain_of[name] for name in left} | set(left)
            order = [mode for mode in modes.values() if mode.name in needed]
            shift = number % max(len(order), 1)
            work.append((together, temperature, order[shift:] + order[:shift]))
    warm_up = {mode.name: mode for _, _, order in work for mode in order}
    total = len(warm_up) + sum(len(order) * len(together) for together, _, order in work)
    with journal.open("a") as file, Progress(total, unit="outputs", label="measure") as progress:
        for mode in warm_up.values():
            decode(mode, prompts[:batch], TEMPERATURES[0], min(WARM_UP_TOKENS, max_new_tokens))
            progress.advance(1)
        for together, temperature, order in work:
            for mode in order:
                found = decode(mode, together, temperature, max_new_tokens)
                for prompt, counts in zip(together, found, strict=True):
                    where = session, mode.name, mode.weights, temperature, prompt.id
                    outputs.append(Output(*where, counts))
                    file.write(json.dumps(dataclasses.asdict(outputs[-1])) + "\n")
                file.flush()
                progress.advance(len(together))
    return paired(outputs, plain_of)


def decode(
    mode: Mode, prompts: Sequence[Prompt], temperature: float, max_new_tokens: int
) -> list[dict[str, float]]:
    """Their outputs; each has an equal share of the time that they took together."""
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    requests = [Request(id=prompt.id, prompt=prompt.ids, sampling=sampling) for prompt in prompts]
    decoder = SpeculativeDecoder(mode.target, mode.drafter)
    started = time.perf_counter()
    results = decoder.generate(requests)
    seconds = (time.perf_counter() - started) / len(prompts)
    all_counts = []
    for result in results:
        stats = result.stats
        found = (
            stats.num_emitted_tokens,
            stats.num_steps,
            stats.num_accepted_tokens,
            stats.num_tried_tokens,
            len(result.tokens),
            seconds,
        )
        all_counts.append(dict(zip(COUNTS, map(float, found), strict=True)))
    return all_counts


def begin(journal: Path, settings: Mapping[str, Any]) -> None:
    """Open the journal with the settings as its first line, or go on with one that has the same.

    A last line that a kill cut short is dropped.

    Raises:
        UserError: it holds measurements with other settings.
    """
    now = json.loads(canonical({"settings": settings}))
    text = journal.read_text() if journal.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if not whole:
        journal.write_text(json.dumps(now) + "\n")
        return
    before = json.loads(whole.splitlines()[0])
    if "settings" not in before:
        raise UserError("the journal does not say with which settings", journal, "remove it")
    changed = differing_keys(before["settings"], now["settings"])
    if changed:
        raise UserError(
            f"the journal holds measurements with other settings ({', '.join(changed)} differ)",
            journal,
            "choose another --out, or remove this one",
        )
    if whole != text:
        journal.write_text(whole)


def read(journal: Path) -> list[Output]:
    """What was measured before."""
    return [Output(**json.loads(line)) for line in journal.read_text().splitlines()[1:]]


def check_weights(outputs: Iterable[Output], weights: Mapping[str, str], journal: Path) -> None:
    """What is in the journal was made by what is compared now.

    Raises:
        UserError: a run has other weights than when it was measured.
    """
    for output in outputs:
        now = weights.get(output.mode, output.weights)
        if output.weights != now:
            raise UserError(
                f"the journal holds measurements of {output.mode} with other weights "
                f"({output.weights}, now {now})",
                journal,
                "choose another --out, or remove this one",
            )


def paired(outputs: Sequence[Output], plain_of: Mapping[str, str]) -> Pairs:
    """The outputs of every run whose plain output was made in the same session."""
    counts = {(o.session, o.mode, o.temperature, o.prompt): o.counts for o in outputs}
    pairs = {}
    for output in outputs:
        plain = plain_of.get(output.mode)
        if plain is not None:
            where = output.temperature, output.prompt
            if (output.session, plain, *where) in counts:
                beside = counts[output.session, plain, *where]
                pairs[output.mode, *where] = Pair(output.counts, beside)
    return pairs


class Table:
    """Sums over prompts and seeds, and their bootstrap."""

    def __init__(
        self, pairs: Pairs, prompts: Sequence[str], num_seeds: int, *, is_timed: bool = True
    ):
        """`prompts` by id; all rows have as many seeds.

        Not `is_timed` are outputs that shared a batch: they have no time of their own.
        """
        self.pairs = pairs
        self.is_timed = is_timed
        self.prompts = prompts
        self.prompt_draws = resamples(len(prompts), RESAMPLES, 0)
        self.seed_draws = resamples(num_seeds, RESAMPLES, 1)

    def samples(self, runs: Sequence[Run], temperature: float, side: str, name: str) -> Array:
        """[1 + R] a count of one side of the pairs, summed, then the sums of the resamples."""
        values = np.array(
            [
                [getattr(self.pairs[r.name, temperature, p], side)[name] for p in self.prompts]
                for r in runs
            ]
        )  # [S, P]
        by_prompt = values[self.seed_draws].sum(1)  # [R, P]
        drawn = np.take_along_axis(by_prompt, self.prompt_draws, axis=1).sum(1)
        return np.concatenate([[values.sum()], drawn])

    def rate(
        self, runs: Sequence[Run], temperature: float, above: str, below: str, side: str = "own"
    ) -> Array:
        """[1 + R] of a ratio of sums; 0 / 0 is NaN."""
        return divide(
            self.samples(runs, temperature, side, above),
            self.samples(runs, temperature, side, below),
        )

    def tau_of_seeds(self, runs: Sequence[Run], temperature: float) -> list[float]:
        """Of every run by itself."""

        def total(run: Run, name: str) -> Array:
            pairs = (self.pairs[run.name, temperature, prompt] for prompt in self.prompts)
            return np.array(sum(pair.own[name] for pair in pairs))

        return [float(divide(total(run, "emitted"), total(run, "steps"))) for run in runs]

    def speedup(self, runs: Sequence[Run], temperature: float) -> Array:
        """[1 + R] tokens per second over those of the plain loop."""
        return divide(
            self.rate(runs, temperature, "tokens", "seconds"),
            self.rate(runs, temperature, "tokens", "seconds", side="plain"),
        )

    def interval(self, samples: Array) -> Interval:
        """The first is the value, the others are resamples of it."""
        return interval(samples[0], samples[1:], len(self.prompts))


def cell(found: Interval | None, *, digits: int = 2, percent: bool = False) -> str:
    """The value and its interval."""
    if found is None or np.isnan(found.value):
        return "–"
    value, low, high = found.value, found.low, found.high
    if percent:
        value, low, high = (100 * (x - 1) for x in (value, low, high))
        return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(
    rows: Mapping[str, Sequence[Run]], table: Table
) -> tuple[list[list[str]], dict[str, dict[str, Any]]]:
    """The table's cells, and the figures behind them; None is one that is not defined."""
    head = ["", "parameters", "training tokens/s"]
    for temperature in TEMPERATURES:
        where = f"T={temperature:g}"
        head += [f"α, {where}", f"τ, {where}", f"τ of seeds, {where}"]
        head += [f"change of τ, {where}", f"speed, {where}"]
    first = next((runs for runs in rows.values() if runs[0].own_target is None), None)
    lines, figures = [head], {}
    for name, runs in rows.items():
        tokens, seconds = np.sum([run.training() for run in runs], axis=0)
        speed = float(tokens / seconds) if seconds else float("nan")
        line = [name, f"{runs[0].parameters() / 1e6:.2f} M", f"{speed:,.0f}"]
        record: dict[str, Any] = {"parameters": runs[0].parameters(), "training_speed": speed}
        for temperature in TEMPERATURES:
            tau = table.rate(runs, temperature, "emitted", "steps")
            change = None
            if first is not None and runs[0].own_target is None:
                of_first = table.rate(first, temperature, "emitted", "steps")
                change = table.interval(divide(tau, of_first))
            each = table.tau_of_seeds(runs, temperature)
            found = {
                "alpha": table.interval(table.rate(runs, temperature, "accepted", "tried")),
                "tau": table.interval(tau),
                "change": change,
                "speed": table.interval(table.speedup(runs, temperature))
                if table.is_timed
                else None,
            }
            line += [
                cell(found["alpha"], digits=3),
                cell(found["tau"]),
                f"{min(each):.2f}–{max(each):.2f}",
                "–" if runs is first else cell(change, percent=True),
                cell(found["speed"]),
            ]
            record[f"T={temperature:g}"] = {
                key: None if one is None or np.isnan(one.value) else dataclasses.asdict(one)
                for key, one in found.items()
            } | {"tau_of_seeds": each}
        lines.append(line)
        figures[name] = record
    return lines, figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of draftsmith train")
    parser.add_argument("--target", default="embedded", help="folder, hub id or embedded")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument(
        "--batch", type=int, default=1, help="prompts at a time; speed is told of 1 only"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--last", action="store_true", help="the weights of the last step")
    parser.add_argument("--out", type=Path, required=True, help="journal, table and figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    runs = [run for run in map(Run, args.runs) if run.is_finished()]
    if not runs:
        raise SystemExit("none of the folders holds a finished run of draftsmith train")
    try:
        compare(runs, args)
    except UserError as error:
        raise SystemExit(str(error)) from error


def compare(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Measure what is not measured yet, and write the table.

    Raises:
        UserError: the runs, the target and the journal do not belong together.
    """
    if args.last:
        copies = args.out / "last"
        runs = [at_last_step(run, copies / str(number)) for number, run in enumerate(runs)]
    rows = rows_of(runs)
    where = TargetSettings(path=args.target, device="cpu")
    target = where.load()
    source = StandardLibraryPrompts(
        split="evaluate", limit=args.prompts, prompt_tokens=args.prompt_tokens
    )
    prompts = source.load(target.tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    journal = args.out / "journal.jsonl"
    settings = {
        "target": target.fingerprint,
        "target_weights": weights_hash(Path(where.location)),
        "prompts": describe(source),
        "prompts_hash": content_hash([prompt.id for prompt in prompts]),
        "temperatures": TEMPERATURES,
        "max_new_tokens": args.max_new_tokens,
        "draft_length": args.draft_length,
        "batch": args.batch,
        "threads": args.threads,
        "torch": torch.__version__,
    }
    begin(journal, settings)
    modes = modes_of(runs, target, args.draft_length, args.batch)
    pairs = measure(modes, prompts, args.max_new_tokens, args.batch, journal)
    num_seeds = len(next(iter(rows.values())))
    ids = [prompt.id for prompt in prompts]
    table = Table(pairs, ids, num_seeds, is_timed=args.batch == 1)
    lines, figures = report(rows, table)
    lines.insert(1, ["---"] * len(lines[0]))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (args.out / "table.md").write_text(text)
    record = {"settings": settings, "rows": figures}
    (args.out / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
