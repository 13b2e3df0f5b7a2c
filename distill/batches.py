"""From rows to batches: examples, packing, masks from ids, and a stream whose state is the step.

Shape legend: B packs, L places of a pack.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.laws import TopLaw
from distill.objectives import Objective
from distill.prompts import PromptSettings
from distill.store import Row, RowStore
from distill.target import LoadedTarget


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its output, as ids.

    Attributes:
        prompt_ids: what is given; for an encoder-decoder target what its decoder begins with.
        output_ids: what is learnt.
        learn_prompt: whether the prompt's tokens are learnt too.
        top: what the target said about each output token, where it was stored. After a cut it may
            go on behind the outputs.
        weights: how much each output token counts in the loss, 1 on average over the data; None is
            1 each. After a cut they may go on behind the outputs. A prompt's tokens count 1.
        encoder_ids: what an encoder reads; None where there is none.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    learn_prompt: bool = False
    top: TopLaw | None = field(default=None, compare=False)
    weights: list[float] | None = None
    encoder_ids: list[int] | None = None

    @property
    def asked(self) -> list[int]:
        """What the target was given: the prompt, or what its encoder reads."""
        return self.prompt_ids if self.encoder_ids is None else self.encoder_ids

    @property
    def ids(self) -> list[int]:
        """All of it."""
        return self.prompt_ids + self.output_ids

    @property
    def loss_mask(self) -> list[bool]:
        """Which tokens are learnt; the first never is, since nothing stands before it."""
        mask = [self.learn_prompt] * len(self.prompt_ids) + [True] * len(self.output_ids)
        return [False, *mask[1:]]

    @property
    def learnt_top(self) -> TopLaw | None:
        """What was stored about the learnt tokens, or None where some have nothing."""
        if self.top is None or (self.learn_prompt and len(self.prompt_ids) > 1):
            return None
        return self.top[slice(0 if self.prompt_ids else 1, len(self.output_ids))]

    @property
    def learnt_weights(self) -> list[float]:
        """How much each learnt token counts."""
        weights = [1.0] * len(self.prompt_ids) + (self.weights or [1.0] * len(self.output_ids))
        mask = self.loss_mask
        return [weight for weight, is_learnt in zip(weights, mask, strict=False) if is_learnt]


class FixedData(Protocol):
    """Data that are there before training."""

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Prompts with their outputs, as ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class SeqKD:
    """Rows that the target wrote (Kim & Rush 2016).

    Attributes:
        rows: the store's folder, `rows/` of a `draftsmith generate` run.
        learn_prompt: learn the prompts' tokens too, which are not the target's.
    """

    rows: Path | None = None
    learn_prompt: bool = False

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Every row, in the order of the keys.

        Raises:
            UserError: there are none.
        """
        if self.rows is None:
            raise UserError("data.rows names no folder", hint="data.rows=runs/.../rows")
        rows = sorted(RowStore(self.rows).rows(), key=lambda row: row.key)
        if not rows:
            raise UserError("there are no rows", self.rows, "run `draftsmith generate` first")
        k = min((len(ids) for row in rows for ids in row.top_ids or ()), default=0)
        return [
            Example(
                row.prompt_ids,
                row.output_ids,
                self.learn_prompt,
                _stored_top(row, k),
                encoder_ids=row.encoder_ids,
            )
            for row in rows
        ]


@dataclass(frozen=True, kw_only=True)
class Text:
    """The prompts with the text that follows them in the corpus: no target involved.

    Attributes:
        prompts: prompts with references.
        max_new_tokens: how much of a reference is learnt.
        learn_prompt: learn the prompts' tokens too.
    """

    prompts: PromptSettings
    max_new_tokens: int = 128
    learn_prompt: bool = False

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Every prompt that has a reference; EOS follows references that fit whole.

        Raises:
            UserError: no prompt has one.
        """
        prompts = [prompt for prompt in self.prompts.load(tokenizer) if prompt.reference]
        if not prompts:
            raise UserError(
                "none of the prompts has a reference text to learn",
                hint="name the column: data.prompts.reference_column=...",
            )
        references = tokenizer(
            [str(prompt.reference) for prompt in prompts], add_special_tokens=False, verbose=False
        )["input_ids"]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return [
            Example(prompt.ids, [*ids, *eos][: self.max_new_tokens], self.learn_prompt)
            for prompt, ids in zip(prompts, references, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Batch:
    """Packs of examples.

    Example, the two examples (a | b c) and (d e | f) in a pack of 7 places::

        input_ids     a b c d e f .
        segment_ids   1 1 1 2 2 2 0
        position_ids  0 1 2 0 1 2 0
        loss_mask     F T T F F T F

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64; they start anew with every example.
        segment_ids: [B, L] int64; the example within the pack, 0 is padding.
        loss_mask: [B, L] bool; the token at this place is predicted from the place before.
        top: what was stored about the learnt tokens, in row-major order; None where some have
            nothing.
        weights: [T] float32, how much each of the T learnt tokens counts in the loss, in row-major
            order; None is 1 each.
        encoder_ids: [E, S] int64, what an encoder reads for each of the E examples, pack by pack,
            with zeros behind; None where no example has such a text.
        encoder_mask: [E, S] bool, which of them are there.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    loss_mask: Tensor
    top: TopLaw | None = None
    weights: Tensor | None = None
    encoder_ids: Tensor | None = None
    encoder_mask: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same on another device."""
        values = (getattr(self, field.name) for field in fields(self))
        moved: list[Any] = [None if value is None else value.to(device) for value in values]
        return Batch(*moved)

    def attention_mask(self) -> Tensor:
        """[B, 1, L, L] bool: the query sees its own example up to itself; padding sees padding."""
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        return (same & torch.ones_like(same[0]).tril())[:, None]


Pack = list[Example]


def pack(examples: Sequence[Example], sequence_length: int) -> list[Pack]:
    """First fit: each example goes to the first pack that still has room for it.

    Only the last few open packs are tried, which keeps this linear. Examples longer than a pack
    are cut at the end.
    """
    packs: list[Pack] = []
    room: list[int] = []
    open_packs: list[int] = []
    for example in examples:
        if len(example.ids) > sequence_length:
            kept = max(sequence_length - len(example.prompt_ids), 0)
            example = replace(
                example,
                prompt_ids=example.prompt_ids[:sequence_length],
                output_ids=example.output_ids[:kept],
            )
        size = len(example.ids)
        for index in open_packs:
            if room[index] >= size:
                packs[index].append(example)
                room[index] -= size
                break
        else:
            packs.append([example])
            room.append(sequence_length - size)
            open_packs = [*open_packs, len(packs) - 1][-32:]
    return packs


def _stored_top(row: Row, k: int) -> TopLaw | None:
    """The k likeliest tokens at each output place; rows may have stored more than others."""
    if row.top_ids is None or row.top_logprobs is None or row.tail_mass is None or not k:
        return None
    ids = torch.tensor(row.top_ids, dtype=torch.int32)
    logprobs, tail_mass = torch.tensor(row.top_logprobs), torch.tensor(row.tail_mass)
    return TopLaw(ids, logprobs, tail_mass, row.top_temperature or 1.0).cut(k)


def collate(packs: Sequence[Pack], sequence_length: int) -> Batch:
    """Packs as tensors."""
    shape = (len(packs), sequence_length)
    input_ids, positions, segments = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for row, examples in enumerate(packs):
        begin = 0
        for number, example in enumerate(examples, start=1):
            end = begin + len(example.ids)
            input_ids[row, begin:end] = torch.tensor(example.ids)
            positions[row, begin:end] = torch.arange(end - begin)
            segments[row, begin:end] = number
            loss_mask[row, begin:end] = torch.tensor(example.loss_mask)
            begin = end
    tops = [example.learnt_top for examples in packs for example in examples]
    stored = [top for top in tops if top is not None]
    top = TopLaw.cat(stored) if stored and len(stored) == len(tops) else None
    weights = None
    if any(example.weights is not None for examples in packs for example in examples):
        learnt = (e.learnt_weights for examples in packs for e in examples)
        weights = torch.tensor([weight for each in learnt for weight in each])
    read = [example.encoder_ids for examples in packs for example in examples]
    texts = [torch.tensor(ids) for ids in read if ids is not None]
    if not texts:
        return Batch(input_ids, positions, segments, loss_mask, top, weights)
    lengths = torch.tensor([len(text) for text in texts])
    encoder_ids = pad_sequence(texts, batch_first=True)
    encoder_mask = torch.arange(encoder_ids.shape[1]) < lengths[:, None]
    return Batch(input_ids, positions, segments, loss_mask, top, weights, encoder_ids, encoder_mask)


class Writer(Protocol):
    """Writes examples while the drafter is trained.

    Attributes:
        every: steps for which what is written is used.
    """

    @property
    def every(self) -> int:
        """Steps."""
        ...

    def check(self, objective: Objective, drafter: nn.Module) -> None:
        """Refuse, with a UserError, what cannot learn from what this writes."""
        ...

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
        """Examples on some of these prompts, by the drafter as it is now; see `distill.regimes`."""
        ...


@dataclass(frozen=True, slots=True)
class Pool:
    """Examples of one kind.

    Attributes:
        examples: at least one.
        share: how many of the examples that are learnt come from here, beside other pools' shares.
        writer: continues the examples' prompts anew; None where the examples stay as they are.
    """

    examples: Sequence[Example]
    share: float = 1.0
    writer: Writer | None = None


def mixed(pools: Sequence[Pool], draw: random.Random) -> list[Example]:
    """As many examples as all pools hold, each pool's share of them, evenly interleaved.

    After every example each pool has given its share of those so far, to within one. A pool gives
    all it has in random order before it begins anew.
    """
    total = sum(pool.share for pool in pools)
    queues: list[list[Example]] = [[] for _ in pools]
    taken = [0] * len(pools)
    found = []
    for count in range(1, sum(len(pool.examples) for pool in pools) + 1):
        owed = [pool.share / total * count - got for pool, got in zip(pools, taken, strict=True)]
        number = owed.index(max(owed))
        if not queues[number]:
            queues[number] = list(pools[number].examples)
            draw.shuffle(queues[number])
            queues[number].reverse()
        found.append(queues[number].pop())
        taken[number] += 1
    return found


def alike(pools: Sequence[Pool]) -> list[Pool]:
    """The pools with as many stored tokens at each place, the fewest that any example has."""
    tops = [example.top for pool in pools for example in pool.examples if example.top is not None]
    k = min((top.ids.shape[-1] for top in tops), default=0)

    def cut(example: Example) -> Example:
        if example.top is None or example.top.ids.shape[-1] == k:
            return example
        return replace(example, top=example.top.cut(k))

    return [replace(pool, examples=[cut(example) for example in pool.examples]) for pool in pools]


class BatchStream:
    """Endless global batches; which one comes next hangs on the step number alone.

    Each epoch mixes the pools by (seed, epoch) and packs the examples; its last batch may be short.
    """

    def __init__(
        self, pools: Sequence[Pool], *, sequence_length: int, batch_size: int, seed: int | str
    ):
        """Batches of `batch_size` packs of `sequence_length` places.

        Raises:
            UserError: no example has a token to learn within the sequence length.
        """
        self.pools = list(pools)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        examples = (example for pool in pools for example in pool.examples)
        if not any(any(example.loss_mask[:sequence_length]) for example in examples):
            raise UserError(
                f"no example has an output within {sequence_length} tokens",
                hint="check the data, or raise trainer.sequence_length",
            )
        self._epoch_ends: list[int] = []  # step at which each epoch ends
        self._current: tuple[int, list[Pack]] = (-1, [])

    def __getitem__(self, step: int) -> list[Pack]:
        """The packs of the global batch of `step`."""
        epoch = 0
        while True:
            if epoch == len(self._epoch_ends):
                begin = self._epoch_ends[-1] if self._epoch_ends else 0
                packs = self._packs(epoch)
                self._epoch_ends.append(begin + -(-len(packs) // self.batch_size))
            if step < self._epoch_ends[epoch]:
                break
            epoch += 1
        first = self._epoch_ends[epoch - 1] if epoch else 0
        begin = (step - first) * self.batch_size
        return self._packs(epoch)[begin : begin + self.batch_size]

    def for_process(self, step: int, rank: int, world: int, micro_batch_size: int) -> list[Batch]:
        """This process's share of a global batch, in micro-batches.

        Every process gets as many micro-batches of the same shape; what is missing is filled with
        empty packs, which have nothing to learn. The union over processes is the global batch, for
        every number of processes.
        """
        packs = self[step]
        share = -(-len(packs) // world)
        share = -(-share // micro_batch_size) * micro_batch_size
        mine = packs[rank::world]
        mine = mine + [[] for _ in range(share - len(mine))]
        return [
            collate(mine[begin : begin + micro_batch_size], self.sequence_length)
            for begin in range(0, share, micro_batch_size)
        ]

    def _packs(self, epoch: int) -> list[Pack]:
        if self._current[0] != epoch:
            order = mixed(self.pools, random.Random(f"{self.seed}:{epoch}"))
            self._current = (epoch, pack(order, self.sequence_length))
        return self._current[1]
