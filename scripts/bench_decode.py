"""Time our loop against transformers' `generate`, plain and assisted, interleaved in one run.

    python scripts/bench_decode.py --target distill/embedded_target --drafter runs/quickstart/...

Batch 1, greedy, the same prompts, target, drafter and draft length for all four; EOS is ignored so
that every run emits the same number of tokens. Reported per step (target forward), as medians over
rounds: assisted steps of theirs and ours draft and accept the same tokens, so the ratio of step
times is that of speeds. `--json FILE` writes

    assisted_over_transformers_assisted        their assisted step / our assisted step
    autoregressive_over_transformers_generate  our autoregressive tokens/s / their greedy ones
    loop_overhead_fraction                     our assisted step outside the two models' forwards;
                                               masks and positions are of the forward, as theirs,
                                               and what timing the forwards takes is taken off
    int8_over_fp32                             our assisted tokens/s with both models in int8 / in
                                               fp32; another target, near the first, so other
                                               texts; only where the CPU can (AVX512-VNNI)
    compiled_over_lean_autoregressive, compiled_over_lean_assisted
                                               with --compile: our tokens/s with forwards compiled
                                               by torch / without
    batch8_over_transformers_assisted          8 prompts: our assisted tokens/s, all at once, /
                                               theirs, one by one, as they must be
    generation16_over_transformers             48 prompts, 16 at a time, each to its EOS: our
                                               tokens/s with slot refill / theirs in padded batches
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel

from decode import (
    Drafter,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    lay_out_for_decoding,
    quantize_int8,
)
from decode.cached_model import CachedModel
from decode.drafters import LMDrafter, NoDrafter
from decode.int8.tiles import is_available
from decode.models import load_lm
from distill.prompts import StandardLibraryPrompts

Mode = Callable[[list[int]], list[int]]
Round = dict[str, float]
INT8 = "int8"


class Forwards:
    """Counts and times the forwards of a model, its masks and positions included.

    A timer takes time itself, which would be told as the loop's. So there are two, one around the
    other, and what the outer one sees beside the inner one's forward is what a timer takes.
    """

    def __init__(self) -> None:
        self.durations: list[float] = []
        self._with_timer: list[float] = []
        self.stop: Callable[[], None] = lambda: None

    @property
    def calls(self) -> int:
        """How many there were."""
        return len(self.durations)

    @property
    def seconds(self) -> float:
        """How long they took together."""
        return sum(self.durations)

    @property
    def timers(self) -> float:
        """How long both timers of each took."""
        return 2 * (sum(self._with_timer) - self.seconds)

    def timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, counted and timed."""
        return timed(timed(forward, self.durations), self._with_timer)

    @classmethod
    def of_theirs(cls, model: PreTrainedModel) -> "Forwards":
        """Of a model that transformers calls; by its class, for a hook costs more than it tells."""
        forwards, kind = cls(), type(model)
        model.__class__ = type(kind.__name__, (kind,), {"__call__": forwards.timed(kind.__call__)})
        forwards.stop = lambda: setattr(model, "__class__", kind)
        return forwards

    @classmethod
    def of_ours(cls, cached: CachedModel) -> "Forwards":
        """Of a model over our cache."""
        forwards = cls()
        vars(cached)["forward"] = forwards.timed(cached.forward)
        forwards.stop = lambda: vars(cached).pop("forward")
        return forwards

    def reset(self) -> None:
        """Count from zero."""
        self.durations.clear()
        self._with_timer.clear()


def timed(forward: Callable[..., Any], durations: list[float]) -> Callable[..., Any]:
    """`forward`, its seconds noted, at the least cost to what is around it."""
    note, clock = durations.append, time.perf_counter

    def run(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        output = forward(*args, **kwargs)
        note(clock() - started)
        return output

    return run


def load(folder: str) -> PreTrainedModel:
    """A model in float32."""
    return load_lm(folder, dtype=torch.float32).eval()


def load_for_decoding(folder: str) -> PreTrainedModel:
    """The same, its weights laid out for our loop."""
    model = load(folder)
    lay_out_for_decoding(model)
    return model


def load_in_int8(folder: str) -> PreTrainedModel:
    """The same with its linear layers in eight bits."""
    model = load(folder)
    quantize_int8(model)
    return model


def ours(target: Target, drafter: Drafter, max_new_tokens: int) -> Mode:
    """Our loop."""
    decoder = SpeculativeDecoder(target, drafter)
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)

    def run(ids: list[int]) -> list[int]:
        return decoder.generate([Request(id="0", prompt=ids, sampling=sampling)])[0].tokens

    return run


def theirs(target: PreTrainedModel, assistant: PreTrainedModel | None, max_new_tokens: int) -> Mode:
    """The `generate` of transformers."""

    def run(ids: list[int]) -> list[int]:
        row = torch.tensor([ids])
        with torch.inference_mode():
            output = target.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                assistant_model=assistant,
            )
        tokens: list[int] = output[0, len(ids) :].tolist()
        return tokens

    return run


def time_rounds(
    modes: dict[str, Mode],
    prompts: list[list[int]],
    targets: list[Forwards],
    drafters: list[Forwards],
    num_rounds: int,
) -> tuple[dict[str, list[Round]], dict[str, int]]:
    """Every mode on every prompt, interleaved, `num_rounds` times.

    Returns:
        the figures of each round, and how many outputs differ from those of the first mode of the
        same target: the first of all, or in int8 the first in int8.
    """
    firsts: dict[bool, Mode] = {}
    for name, run in modes.items():
        firsts.setdefault(INT8 in name, run)
        run(prompts[0])
    reference = {key: [first(ids) for ids in prompts] for key, first in firsts.items()}
    rounds: dict[str, list[Round]] = {name: [] for name in modes}
    mismatches = dict.fromkeys(modes, 0)
    for number in range(num_rounds):
        sums = {name: dict.fromkeys(("wall", "steps", "target", "drafter"), 0.0) for name in modes}
        num_tokens = 0
        for index, ids in enumerate(prompts):
            num_tokens += len(reference[False][index])  # as many in every mode, past EOS
            shift = (number + index) % len(modes)
            names = list(modes)
            for name in names[shift:] + names[:shift]:
                for counter in [*targets, *drafters]:
                    counter.reset()
                started = time.perf_counter()
                tokens = modes[name](ids)
                took = time.perf_counter() - started
                sums[name]["wall"] += took - sum(c.timers for c in [*targets, *drafters])
                sums[name]["steps"] += sum(counter.calls for counter in targets)
                sums[name]["target"] += sum(counter.seconds for counter in targets)
                sums[name]["drafter"] += sum(counter.seconds for counter in drafters)
                mismatches[name] += tokens != reference[INT8 in name][index]
        for name, values in sums.items():
            rounds[name].append(
                {
                    "step_ms": values["wall"] / values["steps"] * 1e3,
                    "target_ms": values["target"] / values["steps"] * 1e3,
                    "drafter_ms": values["drafter"] / values["steps"] * 1e3,
                    "other": 1 - (values["target"] + values["drafter"]) / values["wall"],
                    "tokens_per_second": num_tokens / values["wall"],
                    "tokens_per_step": num_tokens / values["steps"],
                }
            )
    return rounds, mismatches


def batch_ratio(ours: Callable[[], int], theirs: Callable[[], int], num_rounds: int) -> float:
    """Median over rounds of our tokens/s / theirs; each function returns its number of tokens."""
    rates: dict[Callable[[], int], list[float]] = {ours: [], theirs: []}
    ours()
    theirs()
    for number in range(num_rounds):
        for run in (ours, theirs) if number % 2 else (theirs, ours):
            started = time.perf_counter()
            num_tokens = run()
            rates[run].append(num_tokens / (time.perf_counter() - started))
    for name, run in (("ours", ours), ("transformers", theirs)):
        print(f"    {name:14s}{statistics.median(rates[run]):10.1f} tokens/s")
    return statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))


def batch8(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    assisted: Mode,
    prompts: list[list[int]],
    args: argparse.Namespace,
) -> float:
    """8 prompts: our assisted decoding of all at once against `assisted`, one by one."""
    wrapped = Target(target, max_batch_size=len(prompts))
    decoder = SpeculativeDecoder(
        wrapped, LMDrafter(drafter, target=wrapped, draft_length=args.draft_length)
    )
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True)
    requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]
    ours = [result.tokens for result in decoder.generate(requests)]
    same = sum(a == assisted(ids) for a, ids in zip(ours, prompts, strict=True))
    print(f"{len(prompts)} prompts at once, assisted: {same} outputs are those of one by one")
    return batch_ratio(
        lambda: sum(len(result.tokens) for result in decoder.generate(requests)),
        lambda: sum(len(assisted(ids)) for ids in prompts),
        args.rounds,
    )


def generation16(
    target: PreTrainedModel,
    their_target: PreTrainedModel,
    prompts: list[list[int]],
    eos: int,
    args: argparse.Namespace,
) -> float:
    """Data generation, 16 at a time, outputs as long as they come."""
    wrapped = Target(target, max_batch_size=16)
    decoder = SpeculativeDecoder(wrapped, NoDrafter())
    sampling = SamplingParams(max_new_tokens=2 * args.max_new_tokens)
    requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]
    # Sorted by length, as one would for padding: theirs is not to be worse than it must.
    ordered = sorted(prompts, key=len)

    def padded() -> list[list[int]]:
        outputs = []
        for begin in range(0, len(ordered), 16):
            batch = ordered[begin : begin + 16]
            width = max(map(len, batch))
            ids = torch.tensor([[eos] * (width - len(row)) + row for row in batch])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
            with torch.inference_mode():
                output = their_target.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=2 * args.max_new_tokens,
                    do_sample=False,
                    eos_token_id=eos,
                    pad_token_id=eos,
                )
            for row in output[:, width:].tolist():
                outputs.append(row[: row.index(eos) + 1] if eos in row else row)
        return outputs

    ours = {
        tuple(r.prompt): out.tokens
        for r, out in zip(requests, decoder.generate(requests), strict=True)
    }
    same = sum(ours[tuple(ids)] == out for ids, out in zip(ordered, padded(), strict=True))
    lengths = sorted(len(tokens) for tokens in ours.values())
    print(
        f"{len(prompts)} prompts, 16 at a time, outputs of {lengths[0]} to {lengths[-1]} tokens, "
        f"median {statistics.median(lengths):.0f}: {same} are the same"
    )
    return batch_ratio(
        lambda: sum(len(result.tokens) for result in decoder.generate(requests)),
        lambda: sum(map(len, padded())),
        args.rounds,
    )


def main() -> None:
    """Time, print, and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument("--drafter", required=True, help="a transformers causal LM folder")
    parser.add_argument("--draft-length", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="time compiled forwards too; may take a minute more"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    # Theirs and ours are separate copies: ours may lay out its weights as it likes.
    targets = [load(args.target), load_for_decoding(args.target)]
    drafters = [load(args.drafter), load_for_decoding(args.drafter)]
    settings = drafters[0].generation_config
    settings.num_assistant_tokens = args.draft_length
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    source = StandardLibraryPrompts(split="evaluate", limit=args.prompts)
    prompts = [prompt.ids for prompt in source.load(tokenizer)]
    many = [
        prompt.ids for prompt in StandardLibraryPrompts(split="evaluate", limit=48).load(tokenizer)
    ]
    target = Target(targets[1], max_batch_size=1)
    drafter = LMDrafter(drafters[1], target=target, draft_length=args.draft_length)
    target_forwards = [Forwards.of_theirs(targets[0]), Forwards.of_ours(target.cached)]
    drafter_forwards = [Forwards.of_theirs(drafters[0]), Forwards.of_ours(drafter.reader.cached)]
    modes = {
        "transformers generate": theirs(targets[0], None, args.max_new_tokens),
        "ours, autoregressive": ours(target, NoDrafter(), args.max_new_tokens),
        "transformers assisted": theirs(targets[0], drafters[0], args.max_new_tokens),
        "ours, assisted": ours(target, drafter, args.max_new_tokens),
    }

    def add(kind: str, target: Target, drafter: LMDrafter) -> None:
        """Two more ways of decoding."""
        target_forwards.append(Forwards.of_ours(target.cached))
        drafter_forwards.append(Forwards.of_ours(drafter.reader.cached))
        modes[f"{kind}, autoregressive"] = ours(target, NoDrafter(), args.max_new_tokens)
        modes[f"{kind}, assisted"] = ours(target, drafter, args.max_new_tokens)

    if is_available():
        int8_target = Target(load_in_int8(args.target), max_batch_size=1)
        int8_drafter = LMDrafter(
            load_in_int8(args.drafter), target=int8_target, draft_length=args.draft_length
        )
        add(INT8, int8_target, int8_drafter)
    if args.compile:
        compiled_target = Target(load_for_decoding(args.target), max_batch_size=1, compiles=True)
        compiled_drafter = LMDrafter(
            load_for_decoding(args.drafter), target=compiled_target, draft_length=args.draft_length
        )
        add("compiled", compiled_target, compiled_drafter)
    rounds, mismatches = time_rounds(modes, prompts, target_forwards, drafter_forwards, args.rounds)

    def median(name: str, figure: str) -> float:
        return statistics.median(entry[figure] for entry in rounds[name])

    def ratio(above: str, below: str, figure: str) -> float:
        """Median of the ratio within a round: slow phases of the machine cancel."""
        pairs = zip(rounds[above], rounds[below], strict=True)
        return statistics.median(a[figure] / b[figure] for a, b in pairs)

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{args.threads} thread(s), {len(prompts)} prompts x {args.max_new_tokens} tokens, "
        f"draft length {args.draft_length}, medians of {args.rounds} rounds"
    )
    header = ("", "tokens/s", "tokens/step", "ms/step", "target", "drafter", "other", "mismatches")
    print(("{:24s}" + "{:>12s}" * 7).format(*header))
    for name in modes:
        print(
            f"{name:24s}{median(name, 'tokens_per_second'):12.1f}"
            f"{median(name, 'tokens_per_step'):12.3f}{median(name, 'step_ms'):12.3f}"
            f"{median(name, 'target_ms'):12.3f}{median(name, 'drafter_ms'):12.3f}"
            f"{median(name, 'other'):12.1%}{mismatches[name]:12d}"
        )
    figures = {
        "assisted_over_transformers_assisted": ratio(
            "transformers assisted", "ours, assisted", "step_ms"
        ),
        "autoregressive_over_transformers_generate": ratio(
            "ours, autoregressive", "transformers generate", "tokens_per_second"
        ),
        "loop_overhead_fraction": median("ours, assisted", "other"),
    }
    if args.compile:
        figures |= {
            f"compiled_over_lean_{mode}": ratio(
                f"compiled, {mode}", f"ours, {mode}", "tokens_per_second"
            )
            for mode in ("autoregressive", "assisted")
        }
    if is_available():
        figures["int8_over_fp32"] = ratio("int8, assisted", "ours, assisted", "tokens_per_second")
    for forwards in [*target_forwards, *drafter_forwards]:
        forwards.stop()
    theirs_alone = modes["transformers assisted"]
    figures["batch8_over_transformers_assisted"] = batch8(
        load_for_decoding(args.target),
        load_for_decoding(args.drafter),
        theirs_alone,
        many[:8],
        args,
    )
    figures["generation16_over_transformers"] = generation16(
        load_for_decoding(args.target), load(args.target), many, tokenizer.eos_token_id, args
    )
    for name, value in figures.items():
        print(f"{name} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
