"""Plan the best draft tree of a drafter for a node budget, and write it as a config.

    python scripts/plan_tree.py --drafter drafters/mine --budget 12 --out my_conf/draft/mine.yaml
    draftsmith evaluate --config-dir my_conf draft=mine drafters.mine=drafters/mine

The target writes the calibration prompts' outputs, the acceptance of children by rank is measured
on them (of heads at each depth), and the tree of most expected tokens is planned: for drawn
children by Sequoia's dynamic programme (Chen et al. 2024), for the likeliest ones node by node
(Medusa, Cai et al. 2024).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from decode import (
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
    expected_accepted,
    plan_best_first,
    plan_without_gaps,
)
from decode.calibration import acceptance_by_depth, acceptance_profile
from decode.drafters import NoDrafter
from decode.models import load_heads, load_lm
from distill.drafter_folder import read_description
from distill.prompts import StandardLibraryPrompts
from distill.run_folder import write_text


def main() -> None:
    """Measure, plan, print, and write the config."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="distill/embedded_target")
    parser.add_argument("--drafter", required=True, help="folder of a causal LM or of heads")
    parser.add_argument("--budget", type=int, default=12, help="drafted nodes at most")
    parser.add_argument("--depth", type=int, default=5, help="of the tree, at most")
    parser.add_argument(
        "--children", default="likeliest", choices=["likeliest", "independent", "distinct"]
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=24, help="of the distillation split")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=8, help="children of a node looked at")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    family = read_description(args.drafter).get("family", "lm")
    if family != "lm" and args.children != "likeliest":
        parser.error("trees of heads are planned of their likeliest children")
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    source = StandardLibraryPrompts(split="distill", limit=args.prompts)
    prompts = [prompt.ids for prompt in source.load(tokenizer)]
    sampling = SamplingParams(temperature=args.temperature, max_new_tokens=args.max_new_tokens)
    texts = calibration_texts(target, prompts, sampling)
    profile: list[float] | list[list[float]]
    if family == "lm":
        drafter = load_lm(args.drafter, dtype=torch.float32).eval()
        flat = acceptance_profile(
            target,
            drafter,
            texts,
            children=args.children,
            num_ranks=args.ranks,
            sampling=sampling,
        )
        print("acceptance by rank:", " ".join(f"{chance:.3f}" for chance in flat))
        profile = flat
    else:
        profile = acceptance_by_depth(
            target,
            load_heads(args.drafter, target),
            texts,
            num_ranks=args.ranks,
            sampling=sampling,
        )
        for depth, row in enumerate(profile, start=1):
            chances = " ".join(f"{chance:.3f}" for chance in row)
            print(f"acceptance by rank at depth {depth}: {chances}")
    if args.children == "likeliest":
        tree = plan_best_first(profile, budget=args.budget, depth=args.depth)
    else:
        tree = plan_without_gaps(flat, budget=args.budget, depth=args.depth)
    tau = 1 + expected_accepted(tree, profile)
    print(f"{tree.num_drafted} nodes, {tree.depth} deep: {tau:.3f} tokens a step expected")
    config = {
        "defaults": ["/schema/draft/planned@_here_"],
        "parents": list(tree.parents),
        "ranks": list(tree.ranks),
        "children": args.children,
    }
    head = (
        f"# {tree.num_drafted} nodes for {args.drafter} at temperature {args.temperature:g}: "
        f"{tau:.3f} tokens a step expected.\n"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, head + OmegaConf.to_yaml(OmegaConf.create(config)))
    print(args.out)


def calibration_texts(
    target: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Prompts, and what the target writes behind them."""
    requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]
    results = SpeculativeDecoder(Target(target), NoDrafter()).generate(requests)
    return [(ids, result.tokens) for ids, result in zip(prompts, results, strict=True)]


if __name__ == "__main__":
    main()
