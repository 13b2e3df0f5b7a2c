"""Train the hybrid's gate: how many tokens of a suffix draft are accepted, learnt by replay.

    python scripts/train_gate.py --outputs runs/generate/DATE/rows --out runs/gate
    draftsmith evaluate drafters.mine=drafters/mine draft=hybrid draft.gate=runs/gate

Outputs are the rows of `draftsmith generate`, or a .jsonl of prompts and outputs (--prompt,
--output), which --tokenizer reads. They are replayed in their order without a target: a draft is
accepted as far as the recorded text goes with it. Half of the drafts are taken, the text goes on by
one token behind the others, so that both kinds of steps of a hybrid are seen. Features and
network: decode/drafters/gate.py; two hidden layers, mean squared error on accepted tokens, as in
Hybrid Verified Decoding. The last fifth of the outputs is held out: printed is the error there of
the gate, of the score, and of the mean.

Drafts must be made as the hybrid will make them: --factor, --min-prob and --as-tree are those of
`draft.suffix`.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from decode.drafters import Gate, SuffixDrafts, save_gate
from decode.drafters.gate import features
from decode.suffix import SuffixDecodingCache, SuffixDraft
from distill.progress import Progress
from distill.store import RowStore

Pair = tuple[Sequence[int], Sequence[int]]  # prompt and output
HIDDEN, BATCH, RATE = 32, 512, 1e-2


def stored_pairs(path: Path) -> list[Pair]:
    """The rows of a store, in the order of their keys."""
    rows = sorted(RowStore(path).rows(), key=lambda row: row.key)
    return [(row.prompt_ids, row.output_ids) for row in rows]


def written_pairs(path: Path, tokenizer: Path, prompt: str, output: str) -> list[Pair]:
    """The rows of a .jsonl."""
    from bench_suffix import encode

    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    prompts, outputs = (encode([row[key] for row in rows], tokenizer) for key in (prompt, output))
    return [(p.tolist(), o.tolist()) for p, o in zip(prompts, outputs, strict=True)]


def num_accepted(draft: SuffixDraft, text: Sequence[int]) -> int:
    """Tokens of a chain or tree that the text goes along with."""
    below = {(p, t): n for n, (p, t) in enumerate(zip(draft.parents, draft.token_ids, strict=True))}
    node = -1
    for count, token in enumerate(text):
        if (node, token) not in below:
            return count
        node = below[node, token]
    return len(text)


@dataclass(frozen=True)
class Seen:
    """A draft behind a context of `length` tokens, of which so many were accepted."""

    draft: SuffixDraft
    length: int
    accepted: int


def replay(pairs: Iterable[Pair], drafts: SuffixDrafts) -> list[list[Seen]]:
    """The drafts on the way through each output, those of no tokens left out."""
    cache, rng = SuffixDecodingCache(drafts.depth), random.Random(0)
    found: list[list[Seen]] = []
    for request, (prompt, output) in enumerate(pairs):
        text, position = [*prompt, *output], len(prompt)
        found.append([])
        cache.start_request(request, prompt)
        while position < len(text):
            draft = cache.speculate(
                request,
                text[max(0, position - drafts.depth) : position],
                max_spec_tokens=min(drafts.max_tokens, len(text) - position),
                max_spec_factor=drafts.factor,
                max_spec_offset=drafts.offset,
                min_token_prob=drafts.min_prob,
                use_tree_spec=drafts.as_tree,
                sources=drafts.sources,
            )
            count = num_accepted(draft, text[position:])
            if draft.token_ids:
                found[-1].append(Seen(draft, position, count))
            end = min(position + 1 + (count if rng.random() < 0.5 else 0), len(text))
            cache.add_active_response(request, text[position:end])
            position = end
        cache.stop_request(request)
    return found


def fit(seen: Sequence[Seen], epochs: int) -> Gate:
    """The gate of least squared error on these drafts."""
    torch.manual_seed(0)
    inputs = torch.tensor([features(one.draft, one.length) for one in seen])
    wanted = torch.tensor([float(one.accepted) for one in seen])
    mean, scale = inputs.mean(0), inputs.std(0) + 1e-3
    inputs = (inputs - mean) / scale
    sizes = (inputs.shape[1], HIDDEN, HIDDEN, 1)
    first, second, last = (torch.nn.Linear(*pair) for pair in itertools.pairwise(sizes))
    network = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    batches = -(-len(seen) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * batches)
    with Progress(epochs, unit="epochs", label="gate") as progress:
        for _ in range(epochs):
            order = torch.randperm(len(seen))
            for start in range(0, len(seen), BATCH):
                rows = order[start : start + BATCH]
                loss = (network(inputs[rows])[:, 0] - wanted[rows]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            progress.advance(1)
    layers = [(one.weight.detach(), one.bias.detach()) for one in (first, second, last)]
    return Gate(mean.numpy(), scale.numpy(), tuple((w.numpy(), b.numpy()) for w, b in layers))


def error(seen: Sequence[Seen], expected: Callable[[Seen], float]) -> float:
    """Mean squared error of a forecast."""
    return float(np.mean([(expected(one) - one.accepted) ** 2 for one in seen]))


def main() -> None:
    """Replay, train, compare, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the gate")
    parser.add_argument("--tokenizer", type=Path, default="distill/embedded_target")
    parser.add_argument("--prompt", default="prompt")
    parser.add_argument("--output", default="output")
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--min-prob", type=float, default=0.1)
    parser.add_argument("--as-tree", action="store_true")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    if args.outputs.suffix == ".jsonl":
        pairs = written_pairs(args.outputs, args.tokenizer, args.prompt, args.output)
    else:
        pairs = stored_pairs(args.outputs)
    drafts = SuffixDrafts(factor=args.factor, min_prob=args.min_prob, as_tree=args.as_tree)
    found = replay(pairs, drafts)
    cut = len(found) - len(found) // 5
    learnt, held_out = (list(itertools.chain(*part)) for part in (found[:cut], found[cut:]))
    if not learnt or not held_out:
        raise SystemExit(f"{args.outputs} gives {len(learnt)} drafts: too few to learn from")
    gate = fit(learnt, args.epochs)
    save_gate(gate, args.out)
    mean = float(np.mean([one.accepted for one in learnt]))
    print(
        f"{len(learnt)} drafts of {cut} outputs, {mean:.2f} tokens accepted of each; squared error "
        f"on {len(held_out)} drafts of the other outputs: "
        f"{error(held_out, lambda one: gate.expected(one.draft, one.length)):.3f} of the gate, "
        f"{error(held_out, lambda one: one.draft.score):.3f} of the score, "
        f"{error(held_out, lambda one: mean):.3f} of that mean"
    )


if __name__ == "__main__":
    main()
