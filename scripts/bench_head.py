"""What a trimmed head saves: the time of a drafter's step, its head whole and trimmed, in turn.

Drafters of one layer, with random weights, which do not change the time; a step is the forward of
one token behind 64 others and the choice of the likeliest. Times are the thread's, not the wall's:
other work on the machine counts as little as it can.

    python scripts/bench_head.py --vocab 4096 --keep 2048 1024 512
    python scripts/bench_head.py --vocab 128000 --keep 32000 8000
"""

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from decode import CachedModel, lay_out_for_decoding
from decode.models import trim

BEFORE, PER_ROUND = 64, 20


def main() -> None:
    """Print a row per head: medians over the rounds, and of the ratio to the whole head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vocab", type=int, default=4096, help="ids")
    parser.add_argument("--keep", type=int, nargs="+", default=[1024], help="of a trimmed head")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=max(args.hidden_size // 64, 1),
        max_position_embeddings=256,
    )
    whole = LlamaForCausalLM(config).eval()
    heads = [args.vocab, *args.keep]
    with torch.inference_mode():
        cached = {}
        for size in heads:
            model = whole if size == args.vocab else trim(whole, range(size))
            lay_out_for_decoding(model)
            cached[size] = CachedModel(model, num_slots=1)
            before = torch.arange(BEFORE)[None]
            cached[size].forward([0], before, keep=[], commit=[BEFORE])
        rounds = [
            {size: seconds_of(cached[size]) for size in heads} for _ in range(args.rounds + 2)
        ][2:]
    for size in heads:
        seconds = statistics.median(each[size] for each in rounds)
        ratio = statistics.median(each[size] / each[args.vocab] for each in rounds)
        print(f"{size:>8,} of {args.vocab:,} ids  {1e6 * seconds:8.1f} us  {ratio:.2f}")


def seconds_of(cached: CachedModel) -> float:
    """Of one step, in the mean over some."""
    token = torch.tensor([[7]])
    began = time.thread_time()
    for _ in range(PER_ROUND):
        cached.forward([0], token).logits.numpy().argmax(-1)
    return (time.thread_time() - began) / PER_ROUND


if __name__ == "__main__":
    main()
