"""Measure every acceptance rule and way of drafting on one pair: a Markdown table.

    python scripts/bench_methods.py --drafter runs/quickstart/drafters/seq_kd

All methods decode the same prompts one by one at temperature 0 and at temperature 1, interleaved.
Per method: its class; τ, tokens per target pass; tokens a second over our loop without a drafter;
and at temperature 0 the share of outputs that are the target's own, token for token. Methods that
learn from outputs begin with none and see the prompts in their order. 95 % bootstrap
intervals over prompts, paired. `--only Rest NGram` measures those whose name has one of the words.
"""

import argparse
import json
import time
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from decode import (
    AcceptanceRule,
    Drafter,
    Exactness,
    GenerationStats,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    lay_out_for_decoding,
)
from decode.acceptance import (
    BlockVerification,
    Greedy,
    KSequence,
    Lenient,
    NearTokens,
    RecursiveRejection,
    Rollback,
    SpeculativeSampling,
    TopTokens,
    TraversalVerification,
    Typical,
)
from decode.drafters import (
    Chains,
    ConfidentChains,
    CostAwareChains,
    Drafting,
    DynamicTrees,
    ExpansionTrees,
    HeuristicChains,
    HybridChains,
    InputGuided,
    MergedTrees,
    NGram,
    NoDrafter,
    PromptLookup,
    Rest,
    SuffixDrafts,
    TokenRecycling,
)
from decode.models import load_lm
from distill.progress import Progress
from distill.prompts import StandardLibraryPrompts
from distill.report.bootstrap import Interval, ratio, ratio_of_ratios, resamples

PLAIN = "no drafter"
ModelFree = SuffixDrafts | PromptLookup | TokenRecycling | InputGuided | NGram | Rest
COUNTS = (2, 2, 1)


@dataclass(frozen=True)
class Method:
    """A rule and what it judges.

    Attributes:
        rule: of acceptance.
        draft: how to draft; None is not at all.
        greedy_only: not measured at temperature 1.
    """

    rule: AcceptanceRule
    draft: Drafting | ModelFree | None
    greedy_only: bool = False

    def drafter(self, model: PreTrainedModel, target: Target) -> Drafter:
        """A new drafter; `model` drafts where one is needed."""
        if self.draft is None:
            return NoDrafter()
        if isinstance(self.draft, ModelFree):
            return self.draft.build(target)
        return self.draft.build(model, target)


def methods(length: int) -> dict[str, Method]:
    """Everything there is, by name; chains are `length` tokens long."""
    chain = Chains(length=length)
    listed = [
        Method(Greedy(), chain, greedy_only=True),
        Method(SpeculativeSampling(), chain),
        Method(BlockVerification(), chain),
        Method(SpeculativeSampling(), HeuristicChains(first=length)),
        Method(SpeculativeSampling(), ConfidentChains()),
        Method(SpeculativeSampling(), CostAwareChains()),
        Method(SpeculativeSampling(), ExpansionTrees(counts=COUNTS)),
        Method(SpeculativeSampling(), DynamicTrees()),
        Method(SpeculativeSampling(), ExpansionTrees(counts=COUNTS, children="independent")),
        Method(KSequence(), ExpansionTrees(counts=COUNTS, children="independent")),
        Method(RecursiveRejection(), ExpansionTrees(counts=COUNTS, children="distinct")),
        Method(TraversalVerification(), ExpansionTrees(counts=COUNTS, children="distinct")),
        Method(Lenient(lenience=0.5), chain),
        Method(Lenient(lenience=0.5, form="square"), chain),
        Method(Lenient(lenience=0.5, form="exponential"), chain),
        Method(Typical(), chain),
        Method(TopTokens(top=3), chain),
        Method(TopTokens(top=3, max_gap=1.0), chain),
        Method(NearTokens(distance=2), chain),
        Method(Rollback(), Chains(length=length, min_confidence=0.3)),
        Method(SpeculativeSampling(), PromptLookup()),
        Method(SpeculativeSampling(), InputGuided()),
        Method(SpeculativeSampling(), NGram(order=2)),
        Method(SpeculativeSampling(), NGram()),
        Method(SpeculativeSampling(), Rest(size=16)),
        Method(SpeculativeSampling(), TokenRecycling()),
        Method(SpeculativeSampling(), SuffixDrafts()),
        Method(SpeculativeSampling(), SuffixDrafts(as_tree=True)),
        Method(SpeculativeSampling(), SuffixDrafts(factor=4.0)),
        Method(SpeculativeSampling(), HybridChains(length=length)),
        Method(SpeculativeSampling(), MergedTrees()),
    ]
    named = {f"{brief(method.rule)} | {brief(method.draft)}": method for method in listed}
    return {f"- | {PLAIN}": Method(SpeculativeSampling(), None)} | named


def brief(settings: Any) -> str:
    """A dataclass without what is as by default."""
    given = [
        f"{field.name}={getattr(settings, field.name)!r}"
        for field in fields(settings)
        if getattr(settings, field.name) != _default(field)
    ]
    return f"{type(settings).__name__}({', '.join(given)})"


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@dataclass
class Run:
    """What one method did at one temperature: an entry per prompt."""

    tokens: list[int]
    steps: list[int]
    seconds: list[float]
    outputs: list[list[int]]


def load(folder: str) -> PreTrainedModel:
    """A model in float32, laid out for decoding."""
    model = load_lm(folder, dtype=torch.float32).eval()
    lay_out_for_decoding(model)
    return model


def measure(
    chosen: dict[str, Method],
    target_model: PreTrainedModel,
    drafter_model: PreTrainedModel,
    prompts: list[list[int]],
    temperature: float,
    max_new_tokens: int,
) -> dict[str, Run]:
    """Every method on every prompt, interleaved; no method always comes first."""
    target = Target(target_model, max_batch_size=1)
    drafters = {name: method.drafter(drafter_model, target) for name, method in chosen.items()}
    decoders = {
        name: SpeculativeDecoder(target, drafters[name], method.rule)
        for name, method in chosen.items()
    }
    params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, ignore_eos=True)
    runs = {name: Run([], [], [], []) for name in decoders}
    names = list(decoders)
    for decoder in decoders.values():
        decoder.generate([Request(id="warm", prompt=prompts[0], sampling=params)])
    for drafter in drafters.values():
        if forget := getattr(drafter, "forget", None):  # what it learnt from the first prompt
            forget()
    label = f"temperature {temperature:g}"
    with Progress(len(prompts) * len(names), unit="runs", label=label) as progress:
        for index, ids in enumerate(prompts):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                request = Request(id=str(index), prompt=ids, sampling=params)
                started = time.perf_counter()
                (result,) = decoders[name].generate([request])
                seconds = time.perf_counter() - started
                stats: GenerationStats = result.stats
                runs[name].seconds.append(seconds)
                runs[name].steps.append(stats.num_steps)
                runs[name].tokens.append(stats.num_emitted_tokens)
                runs[name].outputs.append(result.tokens)
                progress.advance(1)
    return runs


def exactness(rule: AcceptanceRule, temperature: float) -> str:
    """What the figures of a rule are worth."""
    if rule.exactness is Exactness.LOSSLESS and temperature == 0:
        return Exactness.GREEDY.value
    return rule.exactness.value


def figures(runs: dict[str, Run], seed: int = 0) -> dict[str, dict[str, Interval]]:
    """τ, and speed over no drafter, of each method; paired by prompt."""
    plain = next(iter(runs.values()))
    draws = resamples(len(plain.tokens), 2000, seed)
    table = {}
    for name, run in runs.items():
        tokens, steps, seconds = (
            np.array(values, dtype=float) for values in (run.tokens, run.steps, run.seconds)
        )
        # Of equal lengths, but for the first token, which the prompt's own forward gives.
        base = np.array(plain.tokens, dtype=float), np.array(plain.seconds, dtype=float)
        table[name] = {
            "tau": ratio(tokens, steps, draws),
            "speedup": ratio_of_ratios(tokens, seconds, *base, draws),
        }
    return table


def shown(interval: Interval) -> str:
    """A figure and its interval."""
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def main() -> None:
    """Measure, print the table, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument("--drafter", required=True, help="a transformers causal LM folder")
    parser.add_argument("--draft-length", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    target, drafter = load(args.target), load(args.drafter)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    source = StandardLibraryPrompts(split="evaluate", limit=args.prompts)
    prompts = [prompt.ids for prompt in source.load(tokenizer)]
    chosen = {
        name: method
        for name, method in methods(args.draft_length).items()
        if not args.only or PLAIN in name or any(word in name for word in args.only)
    }
    results = {}
    for temperature in (0.0, 1.0):
        fitting = {
            name: method
            for name, method in chosen.items()
            if temperature == 0 or not method.greedy_only
        }
        runs = measure(fitting, target, drafter, prompts, temperature, args.max_new_tokens)
        outputs = next(iter(runs.values())).outputs
        same = {
            name: sum(a == b for a, b in zip(run.outputs, outputs, strict=True))
            for name, run in runs.items()
        }
        results[temperature] = (figures(runs), same)
    print(
        f"\n{len(prompts)} prompts x {args.max_new_tokens} tokens, batch 1, fp32, "
        f"{args.threads} thread(s), torch {torch.__version__}\n"
    )
    print(
        "| rule | drafts | at T = 0 | τ | speed over no drafter | same outputs "
        "| at T = 1 | τ | speed over no drafter |\n" + "| --- " * 9 + "|"
    )
    for name, method in chosen.items():
        cells = [name]
        for temperature, (table, same) in results.items():
            if name not in table:
                cells += ["-"] * 3
                continue
            row = table[name]
            cells += [exactness(method.rule, temperature), shown(row["tau"])]
            cells.append("1" if method.draft is None else shown(row["speedup"]))
            if temperature == 0:
                cells.append(f"{same[name]}/{len(prompts)}")
        print(f"| {' | '.join(cells)} |")
    if args.json:
        figures_of = {
            f"T={temperature:g}": {
                name: {
                    "tau": [row["tau"].value, row["tau"].low, row["tau"].high],
                    "speedup": [row["speedup"].value, row["speedup"].low, row["speedup"].high],
                    "same_outputs": same[name],
                }
                for name, row in table.items()
            }
            for temperature, (table, same) in results.items()
        }
        args.json.write_text(json.dumps(figures_of, indent=2) + "\n")


if __name__ == "__main__":
    main()
