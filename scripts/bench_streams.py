"""Tracebacks, docstrings and signatures of the standard library, replayed without a model.

    python scripts/bench_streams.py
    python scripts/bench_streams.py --write runs/streams     # NAME.jsonl of prompt and output

Three streams that every machine has: `tracebacks`, what the interpreter says of a line that fails
somewhere inside the standard library; `docstrings`, a function's docstring behind its signature;
`signatures`, the signature behind the docstring. An output is replayed as greedy decoding would
emit it: a draft is accepted as far as the recorded text goes with it. Drafters begin with nothing
and learn from outputs, in a random order. Printed are tokens per step with 95 % bootstrap intervals
over outputs, and the tokens drafted per step. Token recycling needs a target's logits, and no
output here is a correction of its input: these two take no part.

The files fit `bench_agent.py --stream`, which replays them on a real target, and
`bench_shift.py --domain tracebacks=FILE --output output`.
"""

import argparse
import ast
import json
import keyword
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_agent import Recorded, shown
from bench_suffix import DEFAULT_TOKENIZER, encode

from decode import Context, Drafter, SamplingBatch, SamplingParams
from decode.drafters import NGramDrafter, PromptLookupDrafter, RestDrafter, SuffixDrafter
from distill.progress import Progress
from distill.report.bootstrap import ratio, resamples
from distill.standard_library import modules

Texts = list[tuple[str, str]]  # prompt and output
Ids = list[tuple[list[int], list[int]]]

# Lines that fail, with a word or a number put in.
FAULTS = (
    "import json; json.loads('{{\"{word}\": {number},}}')",
    "import json; json.loads('[{number}, {word}]')",
    "import json; json.dumps({{'{word}': {{{number}}}}})",
    "import re; re.compile('({word}')",
    "import re; re.compile('{word}[{number}')",
    "import datetime; datetime.datetime.strptime('{word}', '%Y-%m-%d')",
    "import datetime; datetime.date.fromisoformat('{number}-{word}')",
    "import configparser; configparser.ConfigParser().read_string('{word} = {number}')",
    "import configparser; configparser.ConfigParser().get('{word}', 'x')",
    "import xml.etree.ElementTree as tree; tree.fromstring('<{word}><x></{word}>')",
    "import ast; ast.literal_eval('{word} {number}')",
    "import ast; ast.parse('def {word}(:')",
    "import importlib; importlib.import_module('{word}_{number}.{word}')",
    "import decimal; decimal.Decimal('{word}')",
    "import fractions; fractions.Fraction('{word}/{number}')",
    "import ipaddress; ipaddress.ip_address('{number}.{number}.{word}')",
    "import ipaddress; ipaddress.ip_network('10.0.0.{number}/{number}')",
    "import base64; base64.b64decode('{word}=x')",
    "import gzip; gzip.decompress(b'{word}')",
    "import zipfile, io; zipfile.ZipFile(io.BytesIO(b'{word}'))",
    "import tarfile, io; tarfile.open(fileobj=io.BytesIO(b'{word}'))",
    "import pathlib; pathlib.Path('/{word}/{number}.txt').read_text()",
    "import pathlib; pathlib.Path('{word}').relative_to('/{word}/{number}')",
    "import subprocess; subprocess.run(['/{word}/{number}'])",
    "import statistics; statistics.mean([])",
    "import statistics; statistics.stdev([{number}])",
    "import shlex; shlex.split('{word} \"{number}')",
    "import uuid; uuid.UUID('{word}-{number}')",
    "import enum; enum.Enum('{word}', 'a b')('{number}')",
    "import collections; collections.namedtuple('X', ['{word}', 'class'])",
    "import urllib.request; urllib.request.urlopen('{word}:{number}')",
    "import string; string.Template('${word} $').substitute()",
    "import logging; logging.getLogger().setLevel('{word}')",
    "import textwrap; textwrap.wrap('{word} {word}', width=-{number})",
    "import calendar; calendar.monthrange(2024, {number} + 12)",
    "import heapq; heapq.heapify([{number}, '{word}'])",
    "import functools; functools.reduce(lambda a, b: a, [])",
    "import contextlib; contextlib.ExitStack().enter_context('{word}')",
    "import copy, json; copy.deepcopy({{'{word}': json}})",
    "import locale; locale.setlocale(locale.LC_ALL, '{word}')",
)


def report_of(line: str) -> str:
    """What the interpreter says of a line that fails."""
    try:
        exec(compile(line, "<task>", "exec"), {})
    except Exception as error:
        inside = error.__traceback__ and error.__traceback__.tb_next  # without this file's frame
        return "".join(traceback.format_exception(type(error), error, inside))
    raise RuntimeError(f"this does not fail: {line}")


def tracebacks(rng: random.Random, count: int) -> Texts:
    """Failing lines, and what the interpreter says."""
    words = [word for word in sorted({*keyword.softkwlist, *dir(str)}) if word.isalpha()]
    lines = [
        rng.choice(FAULTS).format(word=rng.choice(words), number=rng.randrange(1, 250))
        for _ in range(count)
    ]
    return [(f"# Run\n{line}\n# Output\n", report_of(line)) for line in lines]


def documented() -> Texts:
    """Signatures and docstrings of the standard library's functions, each pair once."""
    found: dict[tuple[str, str], None] = {}
    for name, path in modules():
        if name.startswith(("test", "idlelib")):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (words := ast.get_docstring(node)):
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                found[f"def {node.name}({ast.unparse(node.args)}){returns}:", words] = None
    return list(found)


def streams(count: int) -> dict[str, Texts]:
    """By name, `count` outputs each."""
    rng = random.Random(0)
    failed = tracebacks(rng, count)
    pairs = rng.sample(documented(), count)
    return {
        "tracebacks": failed,
        "docstrings": [(f"{signature}\n", f'    """{words}"""') for signature, words in pairs],
        "signatures": [(f'# A function: """{words}"""\n', line) for line, words in pairs],
    }


def drafters() -> dict[str, Drafter]:
    """What is compared."""
    return {
        "bigrams": NGramDrafter(order=2),
        "trigrams": NGramDrafter(),
        "prompt lookup": PromptLookupDrafter(),
        "REST, 16 nodes": RestDrafter(size=16),
        "suffix, own": SuffixDrafter(sources="own"),
        "suffix, past": SuffixDrafter(sources="past"),
        "suffix": SuffixDrafter(),
        "suffix tree, factor 4": SuffixDrafter(as_tree=True, factor=4.0),
    }


def replay(drafter: Drafter, pairs: Ids) -> list[tuple[int, int, int]]:
    """Tokens, steps and drafted tokens of each output."""
    found = []
    for prompt, output in pairs:
        text, position, steps, drafted = [*prompt, *output], len(prompt), 0, 0
        recorded = Recorded(output)
        drafter.begin(0, torch.tensor(prompt), {})
        while position < len(text):
            context = _context(text[:position], len(text) - position)
            draft = drafter.propose(context)
            outcome = recorded.accept(draft, torch.empty(0), context.sampling)
            position += len(outcome.paths[0])
            steps, drafted = steps + 1, drafted + int(draft.num_nodes) - 1
        drafter.end(0, output)
        found.append((len(output), steps, drafted))
    return found


def _context(tokens: Sequence[int], room: int) -> Context:
    sampling = SamplingBatch.of([SamplingParams()], [torch.Generator()])
    return Context([0], torch.tensor([tokens]), [tokens[-1]], [len(tokens)], [room], {}, sampling)


def main() -> None:
    """Write the streams, or replay them and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=int, default=300, help="of each stream")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    texts = streams(args.outputs)
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        for name, pairs in texts.items():
            rows = [{"prompt": prompt, "output": output} for prompt, output in pairs]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (args.write / f"{name}.jsonl").write_text(lines)
        return
    table: dict[str, list[str]] = {name: [] for name in drafters()}
    lengths = []
    draws = resamples(args.outputs, 2000, 0)
    runs = len(texts) * len(table)
    with Progress(runs, unit="runs", label="replay") as progress:
        for stream, pairs in texts.items():
            sides: list[Any] = [
                encode(list(side), args.tokenizer) for side in zip(*pairs, strict=True)
            ]
            ids = [(p.tolist(), o.tolist()) for p, o in zip(*sides, strict=True)]
            lengths.append(f"{stream}, {np.mean([len(o) for _, o in ids]):.0f} tokens")
            for name, drafter in drafters().items():
                tokens, steps, drafted = np.array(replay(drafter, ids), dtype=float).T
                table[name] += [
                    shown(ratio(tokens, steps, draws)),
                    f"{drafted.sum() / steps.sum():.1f}",
                ]
                progress.advance(1)
    print(f"\nPython {sys.version.split()[0]}, {args.outputs} outputs a stream\n")
    print(f"| drafts | {' | drafted | '.join(lengths)} | drafted |")
    print("| --- " * (1 + 2 * len(lengths)) + "|")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
