"""Is speculative decoding the target's own greedy decoding, token for token, on this model?

The reference is transformers' `generate`; for a target in int8, whose modules round a value another
way than its short way here and there, the short way without drafts. Where an output differs, the
gap between the two tokens' logits tells rounding, which other batch shapes change, from a bug.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from decode.acceptance.greedy import Greedy
from decode.decoder import SpeculativeDecoder
from decode.drafters.none import NoDrafter
from decode.int8.linear import is_int8
from decode.processors import decoder_prompt
from decode.protocols import Drafter
from decode.sampling import SamplingParams
from decode.target import Target

NEAR_TIE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}  # logits


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Where an output leaves the target's own.

    Attributes:
        request_id: whose output.
        position: the first differing token of the output, from 0.
        expected: the target's own token there; None where its output has ended.
        found: the other one; None likewise.
        gap: by how much the less likely of the two falls short of the likeliest token, in logits
            of a plain forward over the agreed text; inf where one output is the other's beginning.
        margin: between that forward's two best logits.
        near_tie: the gap is within what rounding does to this dtype.
    """

    request_id: str
    position: int
    expected: int | None
    found: int | None
    gap: float
    margin: float
    near_tie: bool


@dataclass(frozen=True, slots=True)
class Certificate:
    """The outcome.

    Attributes:
        num_outputs: compared outputs.
        num_tokens: in the target's own outputs.
        mismatches: at most one per output: behind it the texts are different ones.
        reference: whose outputs they were compared with.
    """

    num_outputs: int
    num_tokens: int
    mismatches: tuple[Mismatch, ...]
    reference: str = "transformers' own"

    @property
    def num_wrong(self) -> int:
        """Mismatches that rounding does not explain."""
        return sum(not mismatch.near_tie for mismatch in self.mismatches)

    def __str__(self) -> str:
        """In words, a line per mismatch."""
        head = f"{self.num_outputs} greedy outputs, {self.num_tokens} tokens"
        if not self.mismatches:
            return f"{head}: all are {self.reference}, token for token"
        near = len(self.mismatches) - self.num_wrong
        lines = [
            f"{head}: {len(self.mismatches)} part from {self.reference}, {near} of them at a near "
            f"tie (rounding), {self.num_wrong} elsewhere (a bug: please report it)"
        ]
        lines += [
            f"  {m.request_id}, token {m.position}: {m.found} instead of {m.expected}, gap "
            f"{m.gap:.4g}, top-2 margin {m.margin:.4g}" + (" (near tie)" if m.near_tie else "")
            for m in self.mismatches
        ]
        return "\n".join(lines)


def certify(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    ignore_eos: bool = False,
) -> Certificate:
    """Decode `prompts` greedily, as many at a time as the target has slots, and compare.

    Args:
        target: the model.
        drafter: any.
        prompts: token ids; with their outputs they must fit the context. Of an encoder-decoder
            target these are the sources.
        max_new_tokens: tokens per output.
        ignore_eos: go on past EOS.
    """
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
    requests = [
        target.request(list(prompt), id=f"prompt {number}", sampling=sampling)
        for number, prompt in enumerate(prompts)
    ]
    results = SpeculativeDecoder(target, drafter, Greedy()).generate(requests)
    in_int8 = is_int8(target.model)
    plain = SpeculativeDecoder(target, NoDrafter(), Greedy())
    num_tokens = 0
    mismatches = []
    for request, prompt, result in zip(requests, prompts, results, strict=True):
        if in_int8:
            own = plain.generate([request])[0].tokens
        else:
            own = greedy_output(target.model, prompt, max_new_tokens, ignore_eos=ignore_eos)
        num_tokens += len(own)
        mismatch = compare(target.model, request.id, prompt, own, result.tokens)
        if mismatch is not None:
            mismatches.append(mismatch)
    reference = "the int8 target's own without drafts" if in_int8 else "transformers' own"
    return Certificate(len(requests), num_tokens, tuple(mismatches), reference)


@torch.inference_mode()
def greedy_output(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, *, ignore_eos: bool = False
) -> list[int]:
    """The output of transformers' `generate`, EOS included; `prompt` may be a source."""
    ids = torch.tensor([list(prompt)], device=model.device)
    before = decoder_prompt(model)  # some of which `generate` counts as new
    num_forced = max(0, len(before) - 1)
    eos = None if ignore_eos else model.generation_config.eos_token_id
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens + num_forced,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=eos,
        pad_token_id=0,
    )
    tokens: list[int] = output[0, len(before or prompt) :].tolist()
    return tokens


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    request_id: str,
    prompt: Sequence[int],
    expected: Sequence[int],
    found: Sequence[int],
) -> Mismatch | None:
    """Where `found` leaves `expected`, the target's own output; None where it does not.

    Both begin behind `prompt`, or of an encoder-decoder model are made of it.
    """
    agreed = 0
    shorter = min(len(expected), len(found))
    while agreed < shorter and expected[agreed] == found[agreed]:
        agreed += 1
    if agreed == len(expected) == len(found):
        return None
    own = expected[agreed] if agreed < len(expected) else None
    other = found[agreed] if agreed < len(found) else None
    before = decoder_prompt(model)
    text = torch.tensor([[*(before or prompt), *expected[:agreed]]], device=model.device)
    inputs = {"input_ids": text}
    if before:
        source = torch.tensor([list(prompt)], device=model.device)
        inputs = {"input_ids": source, "decoder_input_ids": text}
    logits = model(**inputs).logits[0, -1].float()
    best = logits.topk(2).values
    gap = float("inf")
    if own is not None and other is not None:
        gap = float(best[0] - logits[[own, other]].min())
    near_tie = gap <= NEAR_TIE.get(model.dtype, 1e-3)
    return Mismatch(request_id, agreed, own, other, gap, float(best[0] - best[1]), near_tie)
