"""What goes into the decoder and what comes out: requests and their results."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from decode.sampling import SamplingParams
from decode.stats import GenerationStats, StepTrace


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue, or a source to make an output of.

    Attributes:
        id: names the result, and with `seed` fixes the draws.
        prompt: token ids, at least one. Of encoder-decoder models it is what the decoder begins
            with, by default the model's own start token; it is no part of the output.
        source: token ids that the encoder of an encoder-decoder model reads; others have none.
        sampling: how to generate.
        seed: the run's seed.
        material: token ids of a text that the output is likely to copy from, besides the prompt.
            Drafters read it, the target does not. The source is, unless something else is given.
    """

    id: str
    prompt: Sequence[int] = ()
    source: Sequence[int] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    material: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """The target's likeliest tokens at each of T output places.

    Attributes:
        ids: [T, K] int64, likeliest first.
        logprobs: [T, K] float32.
        tail_mass: [T] float32, the probability of all other tokens.
    """

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> "TopLogprobs":
        """The `k` likeliest tokens of each row of `logits` [T, V], on the CPU."""
        logprobs = (logits.float() / temperature).log_softmax(-1)
        top = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
        tail = (1 - top.values.double().exp().sum(-1)).clamp(min=0).float()
        return cls(top.indices.cpu(), top.values.cpu(), tail.cpu())

    @classmethod
    def joined(cls, parts: Sequence["TopLogprobs"]) -> "TopLogprobs | None":
        """One after the other; None of nothing."""
        if not parts:
            return None
        columns = zip(*((part.ids, part.logprobs, part.tail_mass) for part in parts), strict=True)
        return cls(*map(torch.cat, map(list, columns)))


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What one request gave.

    Attributes:
        request_id: of the request.
        tokens: output ids, EOS included where it was produced.
        finish_reason: "eos", "stop" (a stop string), "length" (the output limit or the context's
            end), or "context" (prompt or source leave no room: nothing was generated).
        stats: counts and seconds of this request.
        steps: one entry per target forward, the prompt's own first.
        top_logprobs: where the sampling parameters asked for them.
    """

    request_id: str
    tokens: list[int]
    finish_reason: str
    stats: GenerationStats
    steps: list[StepTrace]
    top_logprobs: TopLogprobs | None = None
