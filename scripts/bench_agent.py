"""An agent that writes SQL in five stages, replayed: which way of drafting serves it best?

    python scripts/bench_agent.py --write runs/agent
    draftsmith train ...  # on runs/agent/train.jsonl; docs/model_free/agent.md has the line
    python scripts/bench_agent.py --stream runs/agent/stream.jsonl --drafter runs/agent/drafter

The agent classifies a question, extracts the columns, generates a query, repairs it after an
error, and combines query and words into an answer; questions and schemas are generated from a seed.
Its outputs are recorded, not the model's own: the target reads and verifies every draft at its real
cost, and a draft is accepted as far as the recorded text goes with it. `--write` makes the stream
and, of other questions, what a model drafter can be trained on.

Rows of `draftsmith generate` are replayed likewise (--stream ROWS, --last 40 of them), and a gate
(train_gate.py; it holds the last fifth out) is compared with the score, a threshold (the number)
on it, and what is learnt online:

    python scripts/bench_agent.py --stream runs/rows --last 40 --drafter DRAFTER --gate runs/gate \\
        --ways suffix hybrid "hybrid, gate" "hybrid, 1" "hybrid, 3"
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from decode import (
    Acceptance,
    Draft,
    Drafter,
    Exactness,
    Request,
    SamplingBatch,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    lay_out_for_decoding,
)
from decode.drafters import (
    Chains,
    DynamicTrees,
    HybridChains,
    MergedTrees,
    NGram,
    NoDrafter,
    PromptLookup,
    Rest,
    SuffixDrafts,
)
from distill.progress import Progress
from distill.report.bootstrap import Interval, ratio, ratio_of_ratios, resamples
from distill.store import RowStore

SUBJECTS: tuple[str, ...] = (
    "orders",
    "customers",
    "products",
    "invoices",
    "shipments",
    "employees",
    "stores",
)
SUBJECTS += ("payments", "reviews", "suppliers", "accounts", "visits", "tickets", "courses")
COLUMNS: tuple[str, ...] = (
    "name",
    "city",
    "status",
    "created_at",
    "amount",
    "quantity",
    "price",
    "country",
)
COLUMNS += ("category", "score", "email", "region", "discount", "weight", "priority")
TYPES = {"created_at": "DATE", "amount": "REAL", "quantity": "INTEGER", "price": "REAL"}
TYPES |= {"score": "REAL", "discount": "REAL", "weight": "REAL", "priority": "INTEGER"}
MEASURES = {"total": "SUM", "average": "AVG", "highest": "MAX", "lowest": "MIN"}


def schema(rng: random.Random) -> dict[str, list[str]]:
    """Tables and their columns."""
    tables = rng.sample(SUBJECTS, 3)
    return {table: ["id", *rng.sample(COLUMNS, 4)] for table in tables}


def questions(seed: int, count: int) -> list[list[tuple[str, str]]]:
    """For each question the (prompt, output) of five stages."""
    rng = random.Random(seed)
    schemas = [schema(rng) for _ in range(max(1, count // 12))]
    found: list[list[tuple[str, str]]] = []
    while len(found) < count:
        tables = rng.choice(schemas)
        table = rng.choice(list(tables))
        numbers = [c for c in tables[table] if TYPES.get(c) in ("REAL", "INTEGER")]
        groups = [c for c in tables[table] if c not in TYPES and c != "id"]
        if numbers and groups:
            found.append(stages(rng, tables, table, rng.choice(numbers), rng.choice(groups)))
    return found


def stages(
    rng: random.Random, tables: dict[str, list[str]], table: str, number: str, group: str
) -> list[tuple[str, str]]:
    """The five stages of one question."""
    word, function = rng.choice(list(MEASURES.items()))
    limit = rng.choice([3, 5, 10])
    question = f"What are the {limit} {group} values with the {word} {number} of {table}?"
    typed = {
        name: ", ".join(f"{column} {TYPES.get(column, 'TEXT')}" for column in columns)
        for name, columns in tables.items()
    }
    described = "\n".join(f"CREATE TABLE {name} ({columns});" for name, columns in typed.items())
    head = f"# Schema\n{described}\n# Question\n{question}\n"
    classified = json.dumps(
        {"type": "aggregation", "tables": [table], "needs_join": False, "confidence": "high"},
        indent=2,
    )
    columns = [
        {"table": table, "column": c, "type": TYPES.get(c, "TEXT"), "role": role}
        for c, role in ((group, "group"), (number, "measure"))
    ]
    extracted = json.dumps({"columns": columns, "limit": limit}, indent=2)
    order = "ASC" if word == "lowest" else "DESC"
    query = (
        f"SELECT {table}.{group}, {function}({table}.{number}) AS {word}_{number}\n"
        f"FROM {table}\nWHERE {table}.{number} IS NOT NULL\nGROUP BY {table}.{group}\n"
        f"ORDER BY {word}_{number} {order}\nLIMIT {limit};"
    )
    wrong = query.replace(f"GROUP BY {table}.{group}\n", "")
    error = f"column {table}.{group} must appear in the GROUP BY clause"
    answer = json.dumps(
        {
            "question": question,
            "sql": query,
            "explanation": f"The query groups the rows of {table} by {group}, takes the {word} "
            f"{number} of each group, and returns the {limit} first in {order} order.",
        },
        indent=2,
    )
    return [
        (f"# Task: classify\n{head}# Answer\n", classified),
        (f"# Task: extract the columns\n{head}# Answer\n", extracted),
        (f"# Task: write the query\n{head}{extracted}\n# Answer\n", wrong),
        (f"# Task: repair the query\n{head}{wrong}\n# Error\n{error}\n# Answer\n", query),
        (f"# Task: combine\n{head}{query}\n# Answer\n", answer),
    ]


def write(folder: Path, count: int) -> None:
    """The stream, and what a drafter is trained on: questions of the same kind, other schemas."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, number in (("train", 1, 4 * count), ("stream", 2, count)):
        rows = [
            {"prompt": prompt, "output": output}
            for asked in questions(seed, number)
            for prompt, output in asked
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
        print(f"{folder / name}.jsonl: {len(rows)} outputs")


@dataclass
class Recorded:
    """Accepts what a recorded text says, one sequence at a time."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    text: list[int]
    position: int = 0

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """The path that the text goes; the token behind it is the next."""
        tokens, parents = draft.tokens[0].tolist(), draft.parents[0].tolist()
        below = {(p, t): n for n, (p, t) in enumerate(zip(parents, tokens, strict=True)) if n}
        path = [0]
        while (path[-1], self._next(len(path) - 1)) in below:
            path.append(below[path[-1], self._next(len(path) - 1)])
        next_token = self._next(len(path) - 1)
        self.position += len(path)
        tried = min(len(path), int(draft.num_nodes[0]) - 1)
        return Acceptance([path], [next_token], [tried])

    def _next(self, ahead: int) -> int:
        at = self.position + ahead
        return self.text[at] if at < len(self.text) else 0


def load(folder: str) -> PreTrainedModel:
    """A model in float32, laid out for decoding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lay_out_for_decoding(model)
    return model


def ways(drafter: PreTrainedModel | None, target: Target, gate: str | None) -> dict[str, Drafter]:
    """What is compared."""
    found: dict[str, Drafter] = {
        "no drafter": NoDrafter(),
        "bigrams": NGram(order=2).build(target),
        "trigrams": NGram().build(target),
        "prompt lookup": PromptLookup().build(target),
        "REST, 64 nodes": Rest().build(target),
        "REST, 16 nodes": Rest(size=16).build(target),
        "suffix, own": SuffixDrafts(sources="own").build(target),
        "suffix, past": SuffixDrafts(sources="past").build(target),
        "suffix": SuffixDrafts().build(target),
        "suffix tree, factor 4": SuffixDrafts(as_tree=True, factor=4.0).build(target),
    }
    if drafter is not None:
        found |= {
            "model, chains of 3": Chains(length=3).build(drafter, target),
            "model, trees": DynamicTrees(width=4, depth=4, size=12).build(drafter, target),
            "hybrid": HybridChains(length=3).build(drafter, target),
            "hybrid, 1": HybridChains(length=3, threshold=1.0).build(drafter, target),
            "hybrid, 3": HybridChains(length=3, threshold=3.0).build(drafter, target),
            "merged": MergedTrees().build(drafter, target),
        }
        if gate is not None:
            found["hybrid, gate"] = HybridChains(length=3, gate=gate).build(drafter, target)
            found["hybrid, gate, 3"] = HybridChains(length=3, gate=gate, threshold=3.0).build(
                drafter, target
            )
    return found


def main() -> None:
    """Write the data, or replay it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--stream", type=Path, help="a .jsonl, or the folder of a row store")
    parser.add_argument("--last", type=int, default=0, help="replay so many outputs, the last ones")
    parser.add_argument("--ways", nargs="*", help="what is compared, by name; all if not given")
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument("--drafter", help="a transformers causal LM folder")
    parser.add_argument("--gate", help="folder of the hybrid's gate")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.write:
        write(args.write, args.questions)
        return
    if not args.stream:
        raise SystemExit("give --stream FILE, or --write FOLDER to make one")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    pairs = recorded(args.stream, tokenizer)[-args.last :]
    target = Target(load(args.target), max_batch_size=1)
    drafters = ways(load(args.drafter) if args.drafter else None, target, args.gate)
    if args.ways:
        drafters = {name: drafters[name] for name in ["no drafter", *args.ways]}
    report(replay(target, drafters, pairs), pairs)


def recorded(stream: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts and outputs; the rows of a store in the order of their keys."""
    if stream.is_dir():
        rows = sorted(RowStore(stream).rows(), key=lambda row: row.key)
        return [(row.prompt_ids, row.output_ids) for row in rows]
    with stream.open() as lines:
        texts = [json.loads(line) for line in lines]
    encoded = (
        tokenizer([text[key] for text in texts], add_special_tokens=False)["input_ids"]
        for key in ("prompt", "output")
    )
    return list(zip(*encoded, strict=True))


def replay(
    target: Target, drafters: dict[str, Drafter], pairs: list[tuple[Any, ...]]
) -> dict[str, list[tuple[int, int, float]]]:
    """Tokens, steps and seconds of every output, for every way; interleaved."""
    found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in drafters}
    names = list(drafters)
    with Progress(len(pairs) * len(names), unit="outputs", label="replay") as progress:
        for index, (prompt, output) in enumerate(pairs):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                decoder = SpeculativeDecoder(target, drafters[name], Recorded(output))
                params = SamplingParams(max_new_tokens=len(output), ignore_eos=True)
                request = Request(id=str(index), prompt=prompt, sampling=params)
                started = time.perf_counter()
                (result,) = decoder.generate([request])
                seconds = time.perf_counter() - started
                if result.tokens != output:
                    raise SystemExit(f"output {index} does not fit the target's context")
                found[name].append((len(output), result.stats.num_steps, seconds))
                progress.advance(1)
    return found


def report(found: dict[str, list[tuple[int, int, float]]], pairs: list[tuple[Any, ...]]) -> None:
    """The table."""
    draws = resamples(len(pairs), 2000, 0)
    plain = np.array(found["no drafter"], dtype=float).T
    length = np.mean([len(output) for _, output in pairs])
    print(f"\n{len(pairs)} outputs of {length:.0f} tokens, batch 1\n")
    print("| drafts | tokens/step | tokens/s | over no drafter |\n| --- | --- | --- | --- |")
    for name, counts in found.items():
        tokens, steps, seconds = np.array(counts, dtype=float).T
        cells = [
            shown(ratio(tokens, steps, draws)),
            f"{tokens.sum() / seconds.sum():.0f}",
            shown(ratio_of_ratios(tokens, seconds, plain[0], plain[2], draws)),
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def shown(interval: Interval) -> str:
    """A figure and its interval."""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    main()
