"""Time our loop against transformers' `generate`, plain and assisted, interleaved in one run.

    python scripts/bench_decode.py --target distill/embedded_target --drafter runs/quickstart/...

Batch 1, greedy, the same prompts, target, drafter and draft length for all four; EOS is ignored so
that every run emits the same number of tokens. Reported per step (target forward), as medians over
rounds: assisted steps of theirs and ours draft and accept the same tokens, so the ratio of step
times is that of speeds. `--json FILE` writes

    assisted_over_transformers_assisted        their assisted step / our assisted step
    autoregressive_over_transformers_generate  their greedy step / our autoregressive step
    loop_overhead_fraction                     our assisted step outside the two models' forwards
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from decode import Drafter, Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import LMDrafter, NoDrafter
from distill.prompts import StandardLibraryPrompts


class Forwards:
    """Counts and times the forwards of a model, whoever calls it."""

    def __init__(self, model: PreTrainedModel):
        self.calls, self.seconds, self._started = 0, 0.0, 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started
        self.calls += 1

    def reset(self) -> None:
        self.calls, self.seconds = 0, 0.0


def main() -> None:
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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    target_model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    drafter_model = AutoModelForCausalLM.from_pretrained(args.drafter, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = [
        prompt.ids
        for prompt in StandardLibraryPrompts(split="evaluate", limit=args.prompts).load(tokenizer)
    ]
    settings = drafter_model.generation_config
    settings.num_assistant_tokens = args.draft_length
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0
    forwards = {"target": Forwards(target_model), "drafter": Forwards(drafter_model)}
    target = Target(target_model, max_batch_size=1)
    sampling = SamplingParams(max_new_tokens=args.max_new_tokens, ignore_eos=True)

    def ours(drafter: Drafter) -> Callable[[list[int]], list[int]]:
        decoder = SpeculativeDecoder(target, drafter)

        def run(ids: list[int]) -> list[int]:
            return decoder.generate([Request(id="0", prompt=ids, sampling=sampling)])[0].tokens

        return run

    def theirs(assistant: PreTrainedModel | None) -> Callable[[list[int]], list[int]]:
        def run(ids: list[int]) -> list[int]:
            row = torch.tensor([ids])
            with torch.inference_mode():
                output = target_model.generate(
                    row,
                    attention_mask=torch.ones_like(row),
                    max_new_tokens=args.max_new_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    assistant_model=assistant,
                )
            return output[0, len(ids) :].tolist()

        return run

    modes = {
        "transformers generate": theirs(None),
        "ours, autoregressive": ours(NoDrafter()),
        "transformers assisted": theirs(drafter_model),
        "ours, assisted": ours(
            LMDrafter(drafter_model, target=target, draft_length=args.draft_length)
        ),
    }
    reference = [modes["transformers generate"](ids) for ids in prompts]
    for run in modes.values():
        run(prompts[0])
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in modes}
    mismatches = dict.fromkeys(modes, 0)
    for _ in range(args.rounds):
        sums = {name: dict.fromkeys(("wall", "steps", "target", "drafter"), 0.0) for name in modes}
        for ids, expected in zip(prompts, reference, strict=True):
            for name, run in modes.items():
                for counter in forwards.values():
                    counter.reset()
                started = time.perf_counter()
                tokens = run(ids)
                sums[name]["wall"] += time.perf_counter() - started
                sums[name]["steps"] += forwards["target"].calls
                sums[name]["target"] += forwards["target"].seconds
                sums[name]["drafter"] += forwards["drafter"].seconds
                mismatches[name] += tokens != expected
        for name, values in sums.items():
            rounds[name].append(
                {
                    "step_ms": values["wall"] / values["steps"] * 1e3,
                    "target_ms": values["target"] / values["steps"] * 1e3,
                    "drafter_ms": values["drafter"] / values["steps"] * 1e3,
                    "other": 1 - (values["target"] + values["drafter"]) / values["wall"],
                    "tokens_per_second": len(prompts) * args.max_new_tokens / values["wall"],
                    "tokens_per_step": len(prompts) * args.max_new_tokens / values["steps"],
                }
            )

    def median(name: str, figure: str) -> float:
        return statistics.median(entry[figure] for entry in rounds[name])

    def ratio(theirs: str, ours: str, figure: str) -> float:
        """Median over rounds of the ratio within a round: slow phases of the machine cancel."""
        pairs = zip(rounds[theirs], rounds[ours], strict=True)
        return statistics.median(a[figure] / b[figure] for a, b in pairs)

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{args.threads} thread(s), fp32, {len(prompts)} prompts x {args.max_new_tokens} tokens, "
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
        "autoregressive_over_transformers_generate": 1
        / ratio("transformers generate", "ours, autoregressive", "tokens_per_second"),
        "loop_overhead_fraction": median("ours, assisted", "other"),
    }
    for name, value in figures.items():
        print(f"{name} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
