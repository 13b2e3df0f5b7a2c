"""How soon drafts from past outputs follow a change of subject: outputs replayed, no model.

    python scripts/bench_shift.py --plot shift.png \\
        --domain maths=gsm8k.jsonl --domain sql=spider.jsonl --domain code=humaneval.jsonl

The domains are .jsonl files with a prompt and an output per row (--prompt, --output). Half of the
outputs of each are replayed, one domain after the other, as greedy decoding would emit them, with
three caches:

- growing: begins empty and keeps every output;
- first only: holds the other half of the first domain, and keeps nothing;
- built from it: holds the other half of the domain at hand, and keeps nothing.

Tokens per step are means over windows of outputs. Printed besides: what share of the gap between a
cache that knows nothing of a domain and one built from it the growing cache has closed after 500
outputs (or all there are), and what 256 past outputs bring over none.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_suffix import DEFAULT_TOKENIZER, Documents, encode

from decode.suffix import SuffixDecodingCache

DEPTH, MOST = 64, 32


def step_count(
    cache: SuffixDecodingCache, prompt: Any, output: Any, factor: float, sources: str
) -> int:
    """Steps that an output takes; it is in the cache afterwards."""
    text = np.concatenate([prompt, output])
    position, steps = len(prompt), 0
    cache.start_request("now", prompt)
    while position < len(text):
        draft = cache.speculate(
            "now",
            text[max(0, position - DEPTH) : position],
            max_spec_tokens=MOST,
            max_spec_factor=factor,
            sources=sources,
        )
        end = position
        for token in draft.token_ids:
            if end >= len(text) or token != text[end]:
                break
            end += 1
        end = min(end + 1, len(text))
        cache.add_active_response("now", text[position:end])
        position, steps = end, steps + 1
    cache.stop_request("now")
    cache.evict_cached_response("now")
    return steps


class Replay:
    """One cache along the stream."""

    def __init__(self, args: argparse.Namespace, past: Documents, *, keeps: bool):
        self.cache, self.args, self.keeps = SuffixDecodingCache(DEPTH), args, keeps
        for output in past:
            self.cache.add_output(output)

    def __call__(self, prompt: Any, output: Any) -> tuple[int, int]:
        """Tokens and steps of one output."""
        steps = step_count(self.cache, prompt, output, self.args.factor, self.args.sources)
        if self.keeps:
            self.cache.add_output(output)
        return len(output), steps


def rate(counts: Sequence[tuple[int, int]]) -> float:
    """Tokens per step, pooled."""
    tokens, steps = np.sum(counts, axis=0)
    return float(tokens / steps)


def main() -> None:
    """Replay, print, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER)
    parser.add_argument("--prompt", default="prompt")
    parser.add_argument("--output", default="reference")
    parser.add_argument("--limit", type=int, default=1000, help="outputs replayed per domain")
    parser.add_argument("--window", type=int, default=50, help="outputs per point")
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--sources", default="both", help="both, or past: without the prompt")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    replayed, kept = {}, {}
    for domain in args.domain:
        name, _, file = domain.partition("=")
        with Path(file).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        order = np.random.default_rng(0).permutation(len(rows))
        pairs = [(rows[i][args.prompt] + "\n", rows[i][args.output]) for i in order]
        prompts, outputs = (
            encode(list(texts), args.tokenizer) for texts in zip(*pairs, strict=True)
        )
        half = min(len(pairs) // 2, args.limit)
        replayed[name] = [
            (p, o) for p, o in zip(prompts[:half], outputs[:half], strict=True) if len(o)
        ]
        kept[name] = outputs[half:]
    growing = Replay(args, [], keeps=True)
    first_only = Replay(args, kept[next(iter(kept))], keeps=False)
    curves: dict[str, list[list[tuple[int, int]]]] = {
        "growing": [],
        "first only": [],
        "built from it": [],
    }
    for name, pairs_of in replayed.items():
        own = Replay(args, kept[name], keeps=False)
        nothing = Replay(args, [], keeps=False)
        for curve, replay in (
            ("growing", growing),
            ("first only", first_only),
            ("built from it", own),
        ):
            curves[curve].append([replay(*pair) for pair in pairs_of])
        alone = [nothing(*pair) for pair in pairs_of]
        at = min(500, len(pairs_of))
        late = slice(max(0, at - args.window), at)
        live, built, none = (
            rate(c[late]) for c in (curves["growing"][-1], curves["built from it"][-1], alone)
        )
        closed = (live - none) / (built - none) if built > none else float("nan")
        length = np.mean([len(output) for _, output in pairs_of])
        small = Replay(args, kept[name][:256], keeps=False)
        gain = rate([small(*pair) for pair in pairs_of]) / rate(alone)
        print(
            f"{name}: {len(pairs_of)} outputs of {length:.0f} tokens; tokens/step nothing kept "
            f"{none:.2f}, growing {live:.2f} after {at}, built from {len(kept[name])} {built:.2f}: "
            f"{100 * closed:.0f} % of the gap; {min(256, len(kept[name]))} past outputs bring "
            f"{gain:.2f}x the tokens/step of none"
        )
    if args.plot:
        plot(curves, list(replayed), args)


def plot(
    curves: dict[str, list[list[tuple[int, int]]]], names: list[str], args: argparse.Namespace
) -> None:
    """Tokens per step over the outputs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for (curve, domains), style in zip(curves.items(), ("-", ":", "--"), strict=True):
        start, colour = 0, None
        for counts in domains:
            ats = range(0, len(counts), args.window)
            (line,) = axes.plot(
                [start + at + args.window / 2 for at in ats],
                [rate(counts[at : at + args.window]) for at in ats],
                style,
                color=colour,
                label=curve if colour is None else None,
            )
            start, colour = start + len(counts), line.get_color()
    start = 0
    for name, counts in zip(names, curves["growing"], strict=True):
        axes.axvline(start, color="0.85", linewidth=1, zorder=0)
        axes.text(start + 5, 1.02, name, transform=axes.get_xaxis_transform())
        start += len(counts)
    axes.set(xlabel="outputs so far", ylabel="tokens per step", ylim=(1, None), xlim=(0, start))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
