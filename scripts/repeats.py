"""How much a model repeats itself, and a loss that makes it repeat itself less.

A small model that decodes greedily soon writes the same lines for ever. What it should have
written is at hand: its own law without the token that completes a run of tokens which stood there
before. That is decoding without repeated n-grams (Paulus et al. 2018, section 2.5), and it is
distilled into the weights, on what the model writes itself. Unlikelihood of the repeated tokens
alone (Welleck et al. 2020) says what not to write and not what instead: here it ended in text that
was no Python.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import NoDrafter

RUN = 8  # tokens; shorter ones come again in any program
LONGEST_PERIOD = 42  # tokens; what 128 of them can hold three times


def repeated(ids: Sequence[int], run: int = RUN) -> list[bool]:
    """Of each token: whether the last `run` tokens, it included, stood somewhere before it."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for end in range(1, len(ids) + 1):
        last = tuple(ids[max(0, end - run) : end])
        found.append(len(last) == run and last in seen)
        seen.add(last)
    return found


def ends_in_loop(ids: Sequence[int]) -> bool:
    """Whether it ends in one stretch of tokens three times in a row."""
    return any(
        len(ids) >= 3 * period and list(ids[-3 * period :]) == 3 * list(ids[-period:])
        for period in range(1, LONGEST_PERIOD + 1)
    )


def greedy_outputs(
    model: PreTrainedModel, prompts: Sequence[list[int]], num_tokens: int
) -> list[list[int]]:
    """At most `num_tokens` tokens for each prompt, all at once."""
    longest = max(map(len, prompts)) + num_tokens
    target = Target(model, max_batch_size=len(prompts), max_length=longest + 1)
    sampling = SamplingParams(max_new_tokens=num_tokens)
    requests = [Request(id=str(n), prompt=ids, sampling=sampling) for n, ids in enumerate(prompts)]
    return [result.tokens for result in SpeculativeDecoder(target, NoDrafter()).generate(requests)]


def distance_from_unrepeated(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
) -> Tensor:
    """Mean KL per output token, from the teacher's law without repeats to the model's.

    Where the next token repeats, the teacher's law is without it.
    """
    texts = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]

    def padded(rows: Iterable[Sequence[int]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(model.device)

    ids, is_repeat = padded(texts), padded(map(repeated, texts))
    is_written = padded(
        [False] * len(prompt) + [True] * len(output)
        for prompt, output in zip(prompts, outputs, strict=True)
    )
    chosen = is_written[:, 1:]
    with torch.no_grad():
        logits = teacher(input_ids=ids).logits[:, :-1][chosen].float()
        banned = is_repeat[:, 1:][chosen].nonzero()[:, 0]
        logits[banned, ids[:, 1:][chosen][banned]] = -torch.inf
        p = logits.softmax(-1)
    log_q = model(input_ids=ids).logits[:, :-1][chosen].float().log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
