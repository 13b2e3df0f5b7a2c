"""How tokens are drawn: parameters per sequence, logits to probabilities, one generator each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one sequence is generated.

    Repetition penalty, temperature, top-k, top-p and min-p apply in that order, as in transformers.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability.
        min_p: drop tokens with less than this share of the likeliest one's probability.
        repetition_penalty: divides the logits of tokens that the text holds already; None is what
            the target's generation config says, 1 where it says nothing.
        max_new_tokens: output length limit, EOS included.
        stop: texts that end the output; the token that completes one is its last.
        ignore_eos: go on past EOS, up to the length limit.
        top_logprobs: how many of the target's log-probabilities to keep per output token, at
            `temperature` (1 where that is 0), before penalty, top-k and top-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no sampler can honour."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps every token), got {self.top_k}")
        if self.top_logprobs < 0:
            raise ValueError(f"top_logprobs must be >= 0, got {self.top_logprobs}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be > 0, got {self.repetition_penalty}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters and generators of the sequences of one step.

    Each sequence owns its generator, on the CPU, so that its draws depend neither on the device
    nor on who shares the batch.
    """

    params: tuple[SamplingParams, ...]
    generators: tuple[torch.Generator, ...]
    is_greedy: bool
    has_penalty: bool

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
    ) -> "SamplingBatch":
        """The batch of these sequences."""
        is_greedy = all(p.temperature == 0 for p in params)
        has_penalty = any(p.repetition_penalty not in (None, 1.0) for p in params)
        return cls(tuple(params), tuple(generators), is_greedy, has_penalty)

    def probs(self, logits: Tensor) -> Tensor:
        """The distributions that tokens are drawn from: [B, ..., V] logits to probabilities.

        Greedy sequences get one-hot rows.
        """
        first = self.params[0]
        if all(_same_law(p, first) for p in self.params):
            return warp(logits, first)
        rows = [warp(row[None], p) for row, p in zip(logits, self.params, strict=True)]
        return torch.cat(rows)

    def uniforms(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """[B, max(counts)] uniform draws, counts[b] of them from generator b, zeros behind."""
        draws = torch.zeros(len(counts), max(counts))
        for row, (count, generator) in enumerate(zip(counts, self.generators, strict=True)):
            if self.params[row].temperature > 0:
                draws[row, :count] = torch.rand(count, generator=generator)
        return draws.to(device)


def warp(logits: Tensor, params: SamplingParams) -> Tensor:
    """[..., V] logits to the probabilities that `params` draws from."""
    if params.temperature == 0:
        probs = torch.zeros_like(logits, dtype=torch.float32)
        return probs.scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits.float() / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # A token is dropped when those before it already hold top_p; the first always stays.
        dropped = probs.cumsum(-1) - probs >= params.top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    if params.min_p > 0:
        probs = logits.softmax(-1)
        too_unlikely = probs < params.min_p * probs.amax(-1, keepdim=True)
        logits = logits.masked_fill(too_unlikely, -torch.inf)
    return logits.softmax(-1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [B] by inversion: `probs` [B, V] need not be normalised, `uniforms` [B] lie in [0, 1).

    Sums run in float64, so that a vocabulary of 100k tokens loses none of its tail.
    """
    cumulative = probs.double().cumsum(-1)
    threshold = uniforms.double()[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    # Rounding may put the threshold on the total itself: then the last possible token is meant.
    last_possible = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(-1)
    return torch.minimum(token, last_possible)


def generator_for(seed: int, request_id: str) -> torch.Generator:
    """The generator of one request: the same for every batch size, order and restart."""
    digest = hashlib.sha256(f"{seed}:{request_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _same_law(a: SamplingParams, b: SamplingParams) -> bool:
    return (a.temperature, a.top_k, a.top_p, a.min_p) == (b.temperature, b.top_k, b.top_p, b.min_p)
