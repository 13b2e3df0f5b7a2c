"""Rules for the draft length against the best fixed length in hindsight, without a timer's noise.

    python scripts/bench_lengths.py --drafter runs/quickstart/drafters/seq_kd

At temperature 0 what a step gives hangs on its place in the target's own output alone. So the
drafter drafts once from every place of every output, as long as any rule may ask for, and it is
noted how many of its tokens are the output's and how sure it was of each. Every rule then walks
through the outputs as the decoder would, and its steps are paid by a table of costs: as measured
here between this target and drafter, and made up ones, as other machines have them. A fixed length
of 0 is decoding without a drafter.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from bench_agent import load
from transformers import AutoTokenizer

from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.cost import StepCosts, measure_costs
from decode.draft_length import Confidence, Constant, CostAware, DraftLength, Heuristic
from decode.drafters import NoDrafter
from decode.drafters.reading import Reader
from distill.progress import Progress
from distill.prompts import StandardLibraryPrompts

AT_ONCE = 64  # places that are drafted from together


@dataclass(frozen=True)
class Place:
    """What a draft from one place of an output is worth.

    Attributes:
        accepted: its leading tokens that the output goes on with.
        confidences: the drafter's in each of its tokens.
    """

    accepted: int
    confidences: tuple[float, ...]


def walk(outputs: Sequence[Sequence[Place]], rule: DraftLength, costs: StepCosts) -> float:
    """Tokens a second of a rule that goes through the outputs one after the other."""
    tokens, seconds = 0, 0.0
    for places in outputs:
        rule.begin(0)
        at = 0
        while at < len(places):
            place, room = places[at], len(places) - at - 1
            length = min(rule.choose([0])[0], room)
            sure = [value >= rule.min_confidence for value in place.confidences[:length]]
            length = sure.index(False) if False in sure else length
            accepted = min(place.accepted, length)
            rule.observe([0], [length], [accepted], [place.confidences[:length]])
            at += accepted + 1
            tokens += accepted + 1
            seconds += costs.seconds(length)
    return tokens / seconds


def against_hindsight(
    outputs: Sequence[Sequence[Place]], costs: StepCosts
) -> tuple[int, float, dict[str, float]]:
    """The best fixed length, its speed over no drafter, and the speed of each rule over its."""
    longest = costs.longest
    plain = 1 / costs.seconds(0)
    fixed = [plain] + [walk(outputs, Constant(n), costs) for n in range(1, longest + 1)]
    best = max(range(longest + 1), key=fixed.__getitem__)
    rules: dict[str, DraftLength] = {
        "heuristic": Heuristic(longest=longest, first=min(5, longest)),
        "confidence": Confidence(longest=longest),
        "cost-aware": CostAware(costs),
    }
    speeds = {name: walk(outputs, rule, costs) / fixed[best] for name, rule in rules.items()}
    return best, fixed[best] / plain, speeds


@torch.inference_mode()
def places_of(reader: Reader, text: list[int], start: int, longest: int) -> list[Place]:
    """Draft from behind each token of `text` from `start` on that `longest` more tokens follow."""
    found = []
    ends = range(start, len(text) - longest + 1)
    for first in range(0, len(ends), AT_ONCE):
        part = ends[first : first + AT_ONCE]
        slots = list(range(len(part)))
        for slot, end in zip(slots, part, strict=True):
            reader.begin(slot, torch.tensor(text[:end]))
        tokens = torch.tensor([[text[end - 1]] for end in part])
        drafted, sure = [], []
        for _ in range(longest):
            output = reader.cached.forward(slots, tokens, commit=[1] * len(slots))
            laws = output.logits[:, -1].softmax(-1)
            confidences, chosen = laws.max(-1)
            tokens = chosen[:, None]
            drafted.append(chosen)
            sure.append(confidences)
        rows = zip(
            part, torch.stack(drafted, 1).tolist(), torch.stack(sure, 1).tolist(), strict=True
        )
        for end, row, values in rows:
            right = [token == text[end + place] for place, token in enumerate(row)]
            found.append(Place([*right, False].index(False), tuple(values)))
        for slot in slots:
            reader.cache.release(slot)
    return found


def main() -> None:
    """Draft, walk, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument(
        "--drafter", required=True, nargs="+", help="transformers causal LM folders"
    )
    parser.add_argument("--longest", type=int, default=8, help="tokens of a draft, at most")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    target = Target(load(args.target), max_batch_size=AT_ONCE)
    source = StandardLibraryPrompts(split="evaluate", limit=args.prompts)
    prompts = [prompt.ids for prompt in source.load(tokenizer)]
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens + args.longest, ignore_eos=True)
    requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]
    results = SpeculativeDecoder(target, NoDrafter()).generate(requests)
    texts = [[*ids, *result.tokens] for ids, result in zip(prompts, results, strict=True)]
    flat = (1.0,) * (args.longest + 1)
    made_up = {
        "v(k) = 1, c = 0.05": StepCosts(0.05, flat),
        "v(k) = 1, c = 0.2": StepCosts(0.2, flat),
        "v(k) = 1 + k / 4, c = 0.2": StepCosts(
            0.2, tuple(1 + k / 4 for k in range(args.longest + 1))
        ),
    }
    heading = "drafter, costs | best fixed | its speedup | heuristic | confidence | cost-aware"
    print("| " + heading + " |\n|" + " --- |" * 6)
    for folder in args.drafter:
        reader = Reader(load(folder), target=target)
        tables = {"measured": measure_costs(target.cached, reader.cached, args.longest), **made_up}
        outputs = []
        with Progress(len(texts), unit="outputs", label="draft") as progress:
            for ids, text in zip(prompts, texts, strict=True):
                outputs.append(places_of(reader, text, len(ids), args.longest))
                progress.advance(1)
        name = folder.rstrip("/").rpartition("/")[2]
        for label, costs in tables.items():
            best, speedup, speeds = against_hindsight(outputs, costs)
            figures = " | ".join(f"{value:.3f}" for value in speeds.values())
            print(f"| {name}, {label} | {best} | {speedup:.2f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
