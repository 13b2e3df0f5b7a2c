"""Compare trained drafters: a table of what was trained, over seeds, at temperature 0 and 1.

    draftsmith train --multirun data.rows=ROWS drafter=lm,medusa objective=forward_kl,lk_lambda \\
        seed=0,1,2 output=runs/grid
    python scripts/bench_drafters.py runs/grid/* --out runs/grid/table

Runs that differ in nothing but the seed share a row, named by the settings in which rows differ.
All drafters continue the same held-out prompts one by one, in chains, beside our loop without a
drafter; every prompt's counts are on disk as they come, and a second call goes on from there. α, τ
and the change of τ against the first row carry 95 % intervals of a bootstrap over prompts and over
seeds at once (few seeds make them too narrow; the spread of τ over seeds stands beside). A run that
trained its target too is measured with that target.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from decode import (
    Drafter,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    lay_out_for_decoding,
)
from decode.drafters import NoDrafter, load_drafter
from distill.progress import Progress
from distill.prompts import Prompt, StandardLibraryPrompts

TEMPERATURES = (0.0, 1.0)
COUNTS = ("emitted", "steps", "accepted", "tried", "tokens", "seconds")
PLAIN = ""  # the name of our loop without a drafter
RESAMPLES = 2000
# Settings that follow from others, or by which seeds differ.
DERIVED = {
    "seed",
    "drafter.seed",
    "drafter_fingerprint",
    "target_fingerprint",
    "held_out_hash",
    "data_hash",
}

Array = npt.NDArray[np.float64]
Counts = dict[tuple[str, float, str], dict[str, float]]  # (run, temperature, prompt) -> COUNTS


@dataclass(frozen=True)
class Run:
    """A finished run of `draftsmith train`."""

    folder: Path

    @property
    def name(self) -> str:
        """Of the run in the journal."""
        return str(self.folder)

    @property
    def drafter(self) -> Path:
        """The drafter's folder."""
        return self.folder / "drafter"

    @property
    def own_target(self) -> Path | None:
        """The target that was trained with it."""
        path = self.drafter / "target"
        return path if path.is_dir() else None

    def settings(self) -> dict[str, Any]:
        """Flat: dotted names to values."""
        settings = json.loads((self.folder / "settings.json").read_text())["settings"]
        return dict(flat(settings))

    def parameters(self) -> int:
        """Numbers in the drafter's file."""
        total = 0
        for path in self.drafter.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    total += int(np.prod(file.get_slice(key).get_shape()))
        return total

    def training_speed(self) -> float:
        """Median of tokens per second over the lines of metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rates = [r["tokens_per_second"] for r in map(json.loads, lines) if "tokens_per_second" in r]
        return statistics.median(rates) if rates else float("nan")


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of what lies in nested mappings."""
    if not isinstance(value, dict):
        yield prefix.rstrip("."), value
        return
    for key, inner in value.items():
        yield from flat(inner, f"{prefix}{key}.")


def rows_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the settings in which they differ, the seed left out."""
    settings = [run.settings() for run in runs]
    names = sorted({name for one in settings for name in one} - DERIVED)
    varied = [n for n in names if len({json.dumps(one.get(n)) for one in settings}) > 1]
    # A class tells more than its fields: these count only among runs of the same class.
    groups: dict[str, list[Run]] = defaultdict(list)
    for run, one in zip(runs, settings, strict=True):
        parts = []
        for name in varied:
            group, _, field = name.rpartition(".")
            alike = [o for o in settings if o.get(f"{group}.type") == one.get(f"{group}.type")]
            if field != "type" and len({json.dumps(o.get(name)) for o in alike}) == 1:
                continue
            value = one.get(name)
            if value is not None:
                short = Path(str(value)).parent.name if field == "rows" else value
                parts.append(str(short) if field == "type" else f"{field} {short}")
        groups[", ".join(parts) or "drafter"].append(run)
    return dict(groups)


def measure(
    runs: Sequence[Run], prompts: Sequence[Prompt], args: argparse.Namespace, journal: Path
) -> Counts:
    """Every drafter on every prompt, at both temperatures."""
    counts = read(journal)
    targets: dict[Path, Target] = {}

    def target_at(path: Path) -> Target:
        if path not in targets:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            lay_out_for_decoding(model)
            targets[path] = Target(model, max_batch_size=1)
        return targets[path]

    common = target_at(Path(args.target))
    drafters: dict[str, tuple[Target, Drafter]] = {PLAIN: (common, NoDrafter())}
    for run in runs:
        target = common if run.own_target is None else target_at(run.own_target)
        drafter = load_drafter(run.drafter, target=target, draft=args.draft_length)
        drafters[run.name] = (target, drafter)
    total = len(prompts) * len(TEMPERATURES) * len(drafters)
    with journal.open("a") as file, Progress(total, unit="outputs", label="measure") as progress:
        progress.skip(sum(name in drafters for name, _, _ in counts))
        for number, prompt in enumerate(prompts):
            for temperature in TEMPERATURES:
                names = list(drafters)
                shift = number % len(names)
                for name in names[shift:] + names[:shift]:
                    key = (name, temperature, prompt.id)
                    if key in counts:
                        continue
                    counts[key] = decode(*drafters[name], prompt, temperature, args.max_new_tokens)
                    file.write(json.dumps([*key, counts[key]]) + "\n")
                    file.flush()
                    progress.advance(1)
    return counts


def decode(
    target: Target, drafter: Drafter, prompt: Prompt, temperature: float, max_new_tokens: int
) -> dict[str, float]:
    """One output."""
    sampling = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
    request = Request(id=prompt.id, prompt=prompt.ids, sampling=sampling)
    decoder = SpeculativeDecoder(target, drafter)
    started = time.perf_counter()
    (result,) = decoder.generate([request])
    seconds = time.perf_counter() - started
    stats = result.stats
    found = (
        stats.num_emitted_tokens,
        stats.num_steps,
        stats.num_accepted_tokens,
        stats.num_tried_tokens,
        len(result.tokens),
        seconds,
    )
    return dict(zip(COUNTS, map(float, found), strict=True))


def read(journal: Path) -> Counts:
    """What was measured before; a last line that a kill cut short is dropped."""
    found: Counts = {}
    if journal.is_file():
        text = journal.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            journal.write_text(whole)
        for line in whole.splitlines():
            name, temperature, prompt, counts = json.loads(line)
            found[name, temperature, prompt] = counts
    return found


class Table:
    """Sums over prompts and seeds, and their bootstrap."""

    def __init__(self, counts: Counts, prompts: Sequence[Prompt], num_seeds: int):
        """All rows have as many seeds."""
        self.counts = counts
        self.prompts = [prompt.id for prompt in prompts]
        rng = np.random.default_rng(0)
        self.prompt_draws = rng.integers(len(prompts), size=(RESAMPLES, len(prompts)))
        self.seed_draws = rng.integers(num_seeds, size=(RESAMPLES, num_seeds))

    def sums(self, runs: Sequence[Run], temperature: float, name: str) -> Array:
        """[S, P] of one count."""
        return np.array(
            [[self.counts[r.name, temperature, p][name] for p in self.prompts] for r in runs]
        )

    def samples(self, values: Array) -> Array:
        """[1 + R] the sum, then those of the resamples."""
        by_prompt = values[self.seed_draws].sum(1)  # [R, P]
        drawn = np.take_along_axis(by_prompt, self.prompt_draws, axis=1).sum(1)
        return np.concatenate([[values.sum()], drawn])

    def rate(self, runs: Sequence[Run], temperature: float, above: str, below: str) -> Array:
        """[1 + R] of a ratio of sums."""
        top = self.samples(self.sums(runs, temperature, above))
        rate: Array = top / np.maximum(self.samples(self.sums(runs, temperature, below)), 1e-9)
        return rate

    def speedup(self, runs: Sequence[Run], temperature: float) -> Array:
        """[1 + R] tokens per second over those of the loop without a drafter."""
        plain = {
            name: np.array([[self.counts[PLAIN, temperature, p][name] for p in self.prompts]])
            for name in ("tokens", "seconds")
        }
        rate = self.rate(runs, temperature, "tokens", "seconds")
        slow = {name: np.repeat(values, len(runs), axis=0) for name, values in plain.items()}
        speedup: Array = rate * self.samples(slow["seconds"]) / self.samples(slow["tokens"])
        return speedup


def cell(samples: Array, *, digits: int = 2, percent: bool = False) -> str:
    """The value and its interval."""
    low, high = np.quantile(samples[1:], [0.025, 0.975])
    if percent:
        value, low, high = (100 * (x - 1) for x in (samples[0], low, high))
        return f"{value:+.1f} % [{low:+.1f}, {high:+.1f}]"
    return f"{samples[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(
    rows: Mapping[str, Sequence[Run]], table: Table
) -> tuple[list[list[str]], dict[str, dict[str, Any]]]:
    """The table's cells, and the figures behind them."""
    head = ["", "parameters", "training tokens/s"]
    for temperature in TEMPERATURES:
        where = f"T={temperature:g}"
        head += [f"α, {where}", f"τ, {where}", f"seeds, {where}", "change", f"speed, {where}"]
    first = next(iter(rows.values()))
    lines, figures = [head], {}
    for name, runs in rows.items():
        speeds = statistics.median(run.training_speed() for run in runs)
        line = [name, f"{runs[0].parameters() / 1e6:.2f} M", f"{speeds:,.0f}"]
        record: dict[str, Any] = {"parameters": runs[0].parameters(), "training_speed": speeds}
        for temperature in TEMPERATURES:
            tau = table.rate(runs, temperature, "emitted", "steps")
            alpha = table.rate(runs, temperature, "accepted", "tried")
            of_first = table.rate(first, temperature, "emitted", "steps")
            speed = table.speedup(runs, temperature)
            each = [float(table.rate([run] * len(runs), temperature, "emitted", "steps")[0])
                    for run in runs]  # fmt: skip
            line += [
                cell(alpha, digits=3),
                cell(tau),
                f"{min(each):.2f}–{max(each):.2f}",
                "–" if runs is first else cell(tau / of_first, percent=True),
                cell(speed),
            ]
            record[f"T={temperature:g}"] = {
                "alpha": alpha[0],
                "tau": tau[0],
                "tau_of_seeds": each,
                "change": list(np.quantile((tau / of_first)[1:], [0.025, 0.975])),
                "speed": speed[0],
            }
        lines.append(line)
        figures[name] = record
    return lines, figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of draftsmith train")
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="journal, table and figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    runs = [Run(path) for path in args.runs if (path / "summary.json").is_file()]
    if not runs:
        raise SystemExit("none of the folders holds a finished run of draftsmith train")
    rows = rows_of(runs)
    seeds = {name: len(of_row) for name, of_row in rows.items()}
    if len(set(seeds.values())) > 1:
        raise SystemExit(f"rows must have as many seeds as each other: {seeds}")
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    source = StandardLibraryPrompts(
        split="evaluate", limit=args.prompts, prompt_tokens=args.prompt_tokens
    )
    prompts = source.load(tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    counts = measure(runs, prompts, args, args.out / "journal.jsonl")
    lines, figures = report(rows, Table(counts, prompts, next(iter(seeds.values()))))
    lines.insert(1, ["---"] * len(lines[0]))
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    (args.out / "table.md").write_text(text)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
