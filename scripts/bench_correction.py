"""Corrections, replayed: what drafting gains where the output is nearly the input.

    python scripts/bench_correction.py
    python scripts/bench_correction.py --errors 0.1

Inputs are pieces of the standard library with tokens replaced, dropped and doubled; outputs are the
pieces as they are. The target reads and verifies every draft at its real cost, and a draft is
accepted as far as the recorded output goes with it, as in bench_agent.py. The input is given twice
over: in the prompt, and beside it, as a request's material; `beside` ways see it there only, behind
a prompt of the output's first tokens.
"""

import argparse
import random
import time
from dataclasses import dataclass

import torch
import transformers
from bench_agent import Recorded, load, report
from transformers import AutoTokenizer

from decode import Drafter, Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import InputGuided, NoDrafter, PromptLookup, SuffixDrafts
from distill.progress import Progress
from distill.standard_library import pieces

FIRST = 8  # tokens of the output that are the prompt where the input is not in it


@dataclass(frozen=True)
class Way:
    """A drafter, whether the input is in the prompt, and whether it is given as material."""

    drafter: Drafter
    in_prompt: bool = True
    beside: bool = False


def ways(target: Target) -> dict[str, Way]:
    """What is compared."""
    return {
        "no drafter": Way(NoDrafter()),
        "prompt lookup": Way(PromptLookup().build(target)),
        "suffix, own": Way(SuffixDrafts(sources="own").build(target)),
        "input-guided, prompt": Way(InputGuided().build(target)),
        "input-guided": Way(InputGuided().build(target), beside=True),
        "no drafter, beside": Way(NoDrafter(), in_prompt=False),
        "prompt lookup, beside": Way(PromptLookup().build(target), in_prompt=False, beside=True),
        "suffix, own, beside": Way(
            SuffixDrafts(sources="own").build(target), in_prompt=False, beside=True
        ),
    }


def with_errors(
    tokens: list[int], share: float, rng: random.Random, others: list[int]
) -> list[int]:
    """Some of the tokens replaced, dropped or doubled."""
    found = []
    for token in tokens:
        kind = rng.choice("rdt") if rng.random() < share else "keep"
        if kind == "r":
            found.append(rng.choice(others))
        elif kind != "d":
            found += [token] * (2 if kind == "t" else 1)
    return found


def main() -> None:
    """Replay and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--errors", type=float, default=0.03, help="share of the tokens")
    parser.add_argument("--tokens", type=int, default=200, help="of an output, at most")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    texts = [piece.text for piece in pieces("evaluate")]
    rng = random.Random(0)
    rng.shuffle(texts)
    encoded = tokenizer(texts[: 4 * args.texts], add_special_tokens=False)["input_ids"]
    outputs = [ids[: args.tokens] for ids in encoded if len(ids) >= 64][: args.texts]
    others = [token for output in outputs for token in output]
    inputs = [with_errors(output, args.errors, rng, others) for output in outputs]
    target = Target(load(args.target), max_batch_size=1)
    compared = ways(target)
    found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in compared}
    names = list(compared)
    with Progress(len(outputs) * len(names), unit="outputs", label="replay") as progress:
        for index, (given, output) in enumerate(zip(inputs, outputs, strict=True)):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                way = compared[name]
                rest = output if way.in_prompt else output[FIRST:]
                request = Request(
                    id=str(index),
                    prompt=[*given, given[0]] if way.in_prompt else output[:FIRST],
                    sampling=SamplingParams(max_new_tokens=len(rest), ignore_eos=True),
                    material=given if way.beside else (),
                )
                decoder = SpeculativeDecoder(target, way.drafter, Recorded(rest))
                started = time.perf_counter()
                (result,) = decoder.generate([request])
                seconds = time.perf_counter() - started
                found[name].append((len(result.tokens), result.stats.num_steps, seconds))
                progress.advance(1)
    report(found, [(None, output) for output in outputs])


if __name__ == "__main__":
    main()
