"""Data that the drafter has a hand in: written anew every so many steps, or mixed of several kinds.

A regime stands over fixed data, its source, whose prompts it has continued. What of a batch comes
from the source itself and what is fresh, its share says. The stream in `distill.fresh` asks for
fresh examples when they are due, and keeps them on disk.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import ClassVar, Protocol, TypeAlias, cast, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decode import (
    Acceptance,
    Draft,
    Drafter,
    Exactness,
    GenerationResult,
    Request,
    SamplingBatch,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.acceptance import SpeculativeSampling, TopTokens
from decode.drafters import Chains, NoDrafter
from decode.models import Heads
from distill.batches import Example, FixedData, Pool, SeqKD, alike
from distill.errors import UserError
from distill.objectives import EndToEndTV, Objective
from distill.target import LoadedTarget

DraftModel: TypeAlias = PreTrainedModel | Heads


@runtime_checkable
class PooledData(Protocol):
    """Data of several kinds, each with its share."""

    def pools(self, tokenizer: PreTrainedTokenizerBase) -> list[Pool]:
        """The kinds; of those that are written anew the examples give the prompts."""
        ...


TrainingData: TypeAlias = FixedData | PooledData


def pools_of(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> list[Pool]:
    """What the data consist of; kinds that have no share are left out."""
    if not isinstance(data, PooledData):
        return [Pool(data.examples(tokenizer))]
    return [pool for pool in data.pools(tokenizer) if pool.share > 0]


def with_rows(data: TrainingData, rows: Path) -> TrainingData:
    """The data with `rows` wherever Seq-KD rows name no folder."""
    if isinstance(data, SeqKD) and data.rows is None:
        return replace(data, rows=rows)
    if isinstance(data, Mixture):
        parts = {name: with_rows(part, rows) for name, part in data.parts.items()}
        return replace(data, parts=parts)
    if isinstance(data, Regime):
        return replace(data, source=with_rows(data.source, rows))
    return data


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several kinds of data in one.

    Attributes:
        parts: by name.
        weights: by the same names: each part's share of the examples, up to a common factor.
    """

    parts: Mapping[str, TrainingData]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        """Refuse weights of something else, and none."""
        if self.parts.keys() != self.weights.keys():
            odd = sorted(self.parts.keys() ^ self.weights.keys())[0]
            raise ValueError(f"every part needs a weight and every weight a part; see {odd!r}")
        if min(self.weights.values(), default=0) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"weights must be >= 0 and not all 0, got {dict(self.weights)}")

    def pools(self, tokenizer: PreTrainedTokenizerBase) -> list[Pool]:
        """The parts' pools, alike in how much is stored about each token."""
        total = sum(self.weights.values())
        return alike(
            [
                replace(pool, share=pool.share * self.weights[name] / total)
                for name, part in self.parts.items()
                if self.weights[name] > 0
                for pool in pools_of(part, tokenizer)
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Fixed data whose prompts are continued anew, with the drafter of that moment.

    Attributes:
        source: where prompts come from, and the rest of the examples.
        share: of the examples in each batch that are fresh; the others are the source's own.
        every: steps for which fresh examples are used.
        num_prompts: how many prompts of the source are continued each time.
        sampling: how.
        batch_size: sequences at a time; it does not change the examples.
    """

    source: TrainingData
    share: float = 0.5
    every: int = 100
    num_prompts: int = 256
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0))
    batch_size: int = 16

    def __post_init__(self) -> None:
        """Refuse what writes nothing."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")
        _check_positive(self, "every", "num_prompts", "batch_size")

    def pools(self, tokenizer: PreTrainedTokenizerBase) -> list[Pool]:
        """The source's pools as they are, and once more to be continued."""
        pools = pools_of(self.source, tokenizer)
        if any(pool.writer is not None for pool in pools):
            raise UserError(
                f"the source of {type(self).__name__} is itself written while training",
                "data.source",
                "choose seq_kd or text there, and mix regimes with data=mixture",
            )
        fixed = [replace(pool, share=pool.share * (1 - self.share)) for pool in pools]
        return fixed + [replace(pool, share=pool.share * self.share, writer=self) for pool in pools]

    def check(self, objective: Objective, drafter: nn.Module) -> None:
        """Refuse what cannot learn from this; UserError."""

    def write(
        self,
        examples: Sequence[Example],
        drafter: nn.Module,
        target: LoadedTarget,
        *,
        max_length: int,
        seed: int,
        name: str,
    ) -> list[Example]:
        """Fresh examples on some of the prompts.

        Args:
            examples: whose prompts are continued.
            drafter: as it is now.
            target: that it drafts for.
            max_length: of prompt and output.
            seed: of the run.
            name: of this writing; with the seed it fixes prompts and draws.

        Raises:
            UserError: no prompt has room behind it, or drafter or target cannot be decoded.
        """
        fitting = [e for e in examples if 0 < len(e.prompt_ids) < max_length]
        random.Random(f"{seed}:{name}").shuffle(fitting)
        chosen = fitting[: self.num_prompts]
        sampling = replace(self.sampling, top_logprobs=0)
        requests = [
            Request(
                id=f"{name}:{number}",
                prompt=e.prompt_ids,
                source=e.encoder_ids or (),
                sampling=sampling,
                seed=seed,
            )
            for number, e in enumerate(chosen)
        ]
        try:
            decoder = self._decoder(drafter, target, max_length)
        except ValueError as error:
            raise UserError(str(error), None, "choose another drafter, or data=seq_kd") from error
        results = decoder.generate(requests)
        # A drafter's vocabulary may be larger.
        outputs = [list(takewhile(target.vocab_size.__gt__, result.tokens)) for result in results]
        written = [
            replace(example, output_ids=output, top=None, weights=weights)
            for example, output, weights in zip(
                chosen, outputs, self._weights(results), strict=True
            )
            if output
        ]
        if not written:
            raise UserError(
                f"none of the data's prompts leaves room for an output within {max_length} tokens",
                hint="raise trainer.sequence_length, or choose shorter prompts",
            )
        return written

    def _decoder(
        self, drafter: nn.Module, target: LoadedTarget, max_length: int
    ) -> SpeculativeDecoder:
        """What writes; ValueError where it cannot."""
        raise NotImplementedError

    def _weights(self, results: Sequence[GenerationResult]) -> Sequence[list[float] | None]:
        """How much each token counts."""
        return [None] * len(results)


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Regime):
    """Outputs that the drafter writes itself (GKD, Agarwal et al. 2023; DistillSpec, section 4).

    So it learns what follows its own mistakes. `share` is GKD's λ. The target's tokens are nowhere
    in these outputs: what is learnt is its law of the next token, and no gradient flows through the
    sampling.
    """

    def check(self, objective: Objective, drafter: nn.Module) -> None:
        """Heads do not write by themselves, and own tokens alone teach nothing."""
        if isinstance(drafter, Heads):
            raise UserError(
                "heads cannot write without their target",
                "data",
                "data=mixed_tokens lets them and the target write together",
            )
        _needs_target(self, objective)

    def _decoder(
        self, drafter: nn.Module, target: LoadedTarget, max_length: int
    ) -> SpeculativeDecoder:
        """The drafter in the target's place, ended by what ends the target's outputs."""
        model = cast(PreTrainedModel, drafter)
        alone = Target(model, max_batch_size=self.batch_size, max_length=max_length)
        alone.eos_token_ids = Target(target.model, max_batch_size=1, max_length=2).eos_token_ids
        return SpeculativeDecoder(alone, NoDrafter(), tokenizer=target.tokenizer)


@dataclass(frozen=True, kw_only=True)
class MixedTokens(Regime):
    """Outputs of the drafter, but for tokens that the target finds unlikely (Xu et al. 2024, SKD).

    A token that is not among the target's `top` is replaced by a sample of the target: close to
    what the drafter would write, without the nonsense of one that has just begun to learn. Since
    the target's own forward comes first, it gives the first token; and it gives the last where the
    length limit leaves no room for a draft.

    Attributes:
        top: how many of the target's likeliest tokens are as good as its own.
        draft_length: tokens verified at once; those of an LM do not hang on it.
    """

    top: int = 25
    draft_length: int = 5

    def __post_init__(self) -> None:
        """Refuse tokens that are never good enough, and empty drafts."""
        Regime.__post_init__(self)
        _check_positive(self, "top", "draft_length")

    def check(self, objective: Objective, drafter: nn.Module) -> None:
        """Most of the tokens are the drafter's, which teach nothing by themselves."""
        _needs_target(self, objective)

    def _decoder(
        self, drafter: nn.Module, target: LoadedTarget, max_length: int
    ) -> SpeculativeDecoder:
        runtime, drafting = _runtime(self, self.draft_length, drafter, target, max_length)
        rule = DraftedWhereLikely(self.top)
        return SpeculativeDecoder(runtime, drafting, rule, tokenizer=target.tokenizer)


@dataclass(frozen=True, kw_only=True)
class InTheLoop(Regime):
    """The target's outputs, where the drafter was rejected in writing them weighted up.

    Prompts are decoded losslessly with the drafter; an output token that replaced a rejected draft
    weighs `rejected`, any other `elsewhere`. With `elsewhere` = 0 only wrong positions are learnt,
    as in online speculative decoding (Liu et al. 2023). The weights are then scaled to 1
    on average over all that was decoded, so that neither the size of the loss nor the share of
    these examples in it hangs on them. Greedy outputs are those of greedy Seq-KD rows.

    Attributes:
        rejected: weight of a token whose draft was rejected.
        elsewhere: of the others: accepted ones, and those that no draft was tried for.
        draft_length: tokens per draft.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    rejected: float = 4.0
    elsewhere: float = 1.0
    draft_length: int = 5

    def __post_init__(self) -> None:
        """Refuse weights that turn the drafter away from the target, and empty drafts."""
        Regime.__post_init__(self)
        _check_positive(self, "draft_length")
        if not (self.rejected > 0 and self.elsewhere >= 0):
            raise ValueError(
                f"rejected must be > 0 and elsewhere >= 0, got {self.rejected} and {self.elsewhere}"
            )

    def check(self, objective: Objective, drafter: nn.Module) -> None:
        """An objective of whole drafts needs all their tokens."""
        if isinstance(objective, EndToEndTV) and self.elsewhere == 0:
            raise UserError(
                "end_to_end_tv judges whole drafts, of which only wrong positions would be learnt",
                "data.elsewhere",
                "give the others a weight: data.elsewhere=1",
            )

    def _decoder(
        self, drafter: nn.Module, target: LoadedTarget, max_length: int
    ) -> SpeculativeDecoder:
        runtime, drafting = _runtime(self, self.draft_length, drafter, target, max_length)
        return SpeculativeDecoder(runtime, drafting, tokenizer=target.tokenizer)

    def _weights(self, results: Sequence[GenerationResult]) -> Sequence[list[float] | None]:
        raw = []
        for result in results:
            weights = [self.elsewhere] * len(result.tokens)
            for place in rejected_places(result):
                weights[place] = self.rejected
            raw.append(weights)
        count = sum(len(weights) for weights in raw)
        scale = count / (sum(sum(weights) for weights in raw) or count)
        return [[weight * scale for weight in weights] for weights in raw]


def _runtime(
    regime: Regime, draft_length: int, drafter: nn.Module, target: LoadedTarget, max_length: int
) -> tuple[Target, Drafter]:
    """The target and the drafter beside it, as training measures them."""
    runtime = Target(target.model, max_batch_size=regime.batch_size, max_length=max_length)
    return runtime, Chains(length=draft_length).build(cast(DraftModel, drafter), runtime)


def _check_positive(regime: Regime, *names: str) -> None:
    for name in names:
        if getattr(regime, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(regime, name)}")


def _needs_target(regime: Regime, objective: Objective) -> None:
    if not objective.needs_target:
        raise UserError(
            f"{type(regime).__name__} gives outputs with the drafter's own tokens in them, and "
            f"{type(objective).__name__} would learn these",
            "objective",
            "choose one that asks the target: objective=forward_kl",
        )


def rejected_places(result: GenerationResult) -> list[int]:
    """The output tokens, by place, that the target put where it rejected a drafted one."""
    places, begin = [], 0
    for step in result.steps:
        if step.num_tried > step.num_accepted:
            places.append(begin + step.num_accepted)
        begin += step.num_emitted
    return places


@dataclass(frozen=True)
class DraftedWhereLikely:
    """The rule of speculative KD: a drafted token, or the target's own where that is unlikely.

    A wholly accepted chain ends with its own last token and not with one of the target's: so the
    text does not hang on the length of the drafts. Chains only.

    Attributes:
        top: how many of the target's likeliest tokens are accepted.
    """

    top: int

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def accept(self, draft: Draft, target_logits: Tensor, sampling: SamplingBatch) -> Acceptance:
        """Judge `draft` by the target's logits [B, N, V]."""
        kept = TopTokens(top=self.top).accept(draft, target_logits, sampling)
        behind = target_logits[list(range(len(kept.paths))), kept.num_accepted][:, None]
        # Behind an empty draft, speculative sampling draws from the target.
        own = SpeculativeSampling().accept(Draft.chain(draft.tokens[:, :1]), behind, sampling)
        paths, next_tokens = kept.paths, own.next_tokens
        tokens, sizes = draft.tokens.tolist(), draft.num_nodes.tolist()
        for row, path in enumerate(paths):
            if len(path) == sizes[row] > 1:
                next_tokens[row] = tokens[row][path.pop()]
        return Acceptance(paths, next_tokens, kept.num_tried)
