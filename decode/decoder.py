"""The speculative decoding loop: context, propose, verify, accept, truncate, commit, observe."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from decode.acceptance.sampling import SpeculativeSampling
from decode.cached_model import ModelOutput
from decode.draft import Draft
from decode.penalty import penalised
from decode.protocols import Acceptance, AcceptanceRule, Context, Drafter
from decode.requests import GenerationResult, Request, TopLogprobs
from decode.sampling import SamplingBatch, SamplingParams, generator_for
from decode.stats import GenerationStats, StepRecord, StepTrace
from decode.stopping import Stopping
from decode.target import Target

SHARED_FROM = 16  # tokens from which to copy a common beginning is worth it
NO_STATES: dict[int, Tensor] = {}


@dataclass(slots=True)
class _Sequence:
    """A request in a slot."""

    request: Request
    slot: int
    limit: int
    sampling: SamplingParams
    generator: torch.Generator
    length: int
    output: list[int] = field(default_factory=list)
    steps: list[StepTrace] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    expected_accepted: float = 0.0
    logprobs: list[TopLogprobs] = field(default_factory=list)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    finish_reason: str | None = None

    @property
    def room(self) -> int:
        return self.limit - len(self.output)


class _Batch:
    """Sequences that make steps together, and what of them stays the same from step to step."""

    def __init__(self, sequences: list[_Sequence], tokens: Tensor):
        self.sequences = sequences
        self.has_finished = False  # any of them
        self.seconds = {"draft": 0.0, "verify": 0.0, "other": 0.0}  # of all steps
        self.slots = [sequence.slot for sequence in sequences]
        self._all_tokens = tokens
        first, last = self.slots[0], self.slots[-1]
        # The texts as they lie, where the slots are neighbours.
        self.view = tokens[first : last + 1] if last - first == len(self.slots) - 1 else None
        self.sampling = SamplingBatch.of(
            [sequence.sampling for sequence in sequences],
            [sequence.generator for sequence in sequences],
        )

    def gathered(self, longest: int) -> Tensor:
        """[B, longest] the texts, copied together."""
        return self._all_tokens[:, :longest][self.slots]

    def settle(self) -> None:
        """Share out what the steps took."""
        for sequence in self.sequences:
            for name, seconds in self.seconds.items():
                sequence.seconds[name] += seconds / len(self.sequences)


class SpeculativeDecoder:
    """Decodes requests with a target and a drafter, as many at a time as the target has slots.

    A finished sequence leaves its slot and the next request takes it: no row waits for the slowest.
    With `NoDrafter` this is plain autoregressive decoding.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: AcceptanceRule | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
    ):
        """Put the three together.

        Args:
            target: whose output it is.
            drafter: proposes.
            rule: accepts; None is lossless speculative sampling.
            tokenizer: needed for stop strings only.
            on_step: called with every step of every sequence; its time is counted nowhere.
        """
        self.target = target
        self.drafter = drafter
        self.rule = rule or SpeculativeSampling()
        self.stopping = Stopping(target.eos_token_ids, tokenizer)
        self.on_step = on_step
        self._tokens = torch.zeros(target.max_batch_size, target.max_length + 1, dtype=torch.long)
        self._buffer = self._tokens.numpy()  # the same memory; cheaper to write single tokens to
        self._free = list(range(target.max_batch_size))
        self._active: list[_Sequence] = []
        self._is_on_cpu = target.device.type == "cpu"
        self._now = self._synchronised if target.device.type == "cuda" else time.perf_counter

    def generate(self, requests: Iterable[Request]) -> list[GenerationResult]:
        """All results, in the order of the requests."""
        requests = list(requests)
        ids = [request.id for request in requests]
        if len(set(ids)) != len(ids):
            repeated = next(name for name, count in Counter(ids).items() if count > 1)
            raise ValueError(f"request ids must be unique, {repeated!r} occurs more than once")
        results = {result.request_id: result for result in self.stream(requests)}
        return [results[name] for name in ids]

    def stream(self, requests: Iterable[Request]) -> Iterator[GenerationResult]:
        """Results as they are finished; requests are taken as slots become free."""
        waiting = iter(requests)
        try:
            while True:
                has_entered = yield from self._admit(waiting)
                if self._active:
                    with torch.inference_mode():  # around many steps: to enter it takes its time
                        batch = _Batch(self._active, self._tokens)
                        while not batch.has_finished:
                            self._step(batch)
                        batch.settle()
                elif not has_entered:
                    return
                yield from self._retire()
        finally:  # also where the caller stops listening
            for sequence in self._active:
                self._leave(sequence)
            self._active = []

    def _step(self, batch: _Batch) -> None:
        started = self._now()
        context = self._context(batch)
        ready = self._now()
        draft = self.drafter.propose(context)
        if not self._is_on_cpu:
            draft = draft.to(self.target.device)
        drafted = self._now()
        output = self.target.verify(batch.slots, draft, self.drafter.hidden_layers)
        verified = self._now()
        acceptance = self._conclude(batch, context, draft, output)
        other = self._now() - verified + ready - started
        batch.seconds["draft"] += drafted - ready
        batch.seconds["verify"] += verified - drafted
        batch.seconds["other"] += other
        if self.on_step is not None:
            spent = {"draft": drafted - ready, "verify": verified - drafted, "other": other}
            for record in _records(batch.sequences, context, draft, acceptance, spent):
                self.on_step(record)

    def _conclude(
        self, batch: _Batch, context: Context, draft: Draft, output: ModelOutput
    ) -> Acceptance:
        """Accept, advance, commit, observe."""
        logits = output.logits
        if context.sampling.has_penalty:
            logits = penalised(logits, context, draft)
        acceptance = self.rule.accept(draft, logits, context.sampling)
        self._advance(batch, draft, acceptance, output)
        self.target.commit(batch.slots, draft, acceptance)
        self.drafter.observe(context, draft, acceptance, output.logits)
        return acceptance

    def _context(self, batch: "_Batch") -> Context:
        lengths, roots, room = [], [], []
        for sequence in batch.sequences:  # in Python 3.11 each comprehension would be a call
            lengths.append(sequence.length)
            roots.append((sequence.output or sequence.request.prompt)[-1])
            room.append(sequence.limit - len(sequence.output) - 1)
        return Context(
            slots=batch.slots,
            tokens=batch.gathered(max(lengths)) if batch.view is None else batch.view,
            roots=roots,
            lengths=lengths,
            room=room,
            hidden=self._hidden(batch) if self.drafter.hidden_layers else NO_STATES,
            sampling=batch.sampling,
        )

    def _hidden(self, batch: _Batch) -> dict[int, Tensor]:
        return {
            layer: pad_sequence(
                [sequence.hidden[layer] for sequence in batch.sequences],
                batch_first=True,
                padding_side="left",
            )
            for layer in self.drafter.hidden_layers
        }

    def _advance(
        self, batch: _Batch, draft: Draft, acceptance: Acceptance, output: ModelOutput
    ) -> None:
        """Count the step, and append what each sequence emits.

        A path that EOS, a stop string or the limit cuts ends there from now on, and counts as
        wholly accepted.
        """
        tokens, num_nodes = draft.tokens.tolist(), draft.num_nodes.tolist()
        paths, next_tokens, tried, _ = acceptance
        parents = None if draft.is_chain else draft.parents.tolist()
        is_more_kept = acceptance.expected_accepted is not None or bool(output.hidden)
        for row, sequence in enumerate(batch.sequences):
            path, drafted = paths[row], tokens[row]
            count = len(path) - 1
            is_chain = parents is None
            new = drafted[1 : count + 1] if is_chain else [drafted[node] for node in path[1:]]
            new.append(next_tokens[row])
            kept, reason = self.stopping.cut(sequence.output, new, sequence.sampling)
            if kept <= count:
                del new[kept:], path[kept + 1 :]
                count = tried[row] = kept
            size = num_nodes[row]
            at_leaf = count + 1 == size if parents is None else path[-1] not in parents[row][:size]
            sequence.steps.append(StepTrace(size - 1, at_leaf, tried[row], count, kept))
            if reason is None and len(sequence.output) + kept >= sequence.limit:
                reason = "length"
            if reason == "length" and self.target.forced_eos is not None:
                new[-1] = self.target.forced_eos
            text = self._buffer[sequence.slot]
            for place, token in enumerate(new, start=sequence.length):  # an array takes longer
                text[place] = token
            sequence.output += new
            sequence.length += len(new)
            if reason is not None:
                sequence.finish_reason = reason
                batch.has_finished = True
            if is_more_kept or sequence.sampling.top_logprobs:
                self._keep(sequence, row, kept, acceptance, output)

    def _keep(
        self, sequence: _Sequence, row: int, kept: int, acceptance: Acceptance, output: ModelOutput
    ) -> None:
        """Keep what is wanted of a step besides its `kept` tokens."""
        path, expected = acceptance.paths[row], acceptance.expected_accepted
        nodes = path[:kept]  # behind which the kept tokens come
        if expected is not None:
            last = path[kept] + 1 if kept < len(path) else None
            sequence.expected_accepted += float(expected[row, :last].sum())
        sampling = sequence.sampling
        if sampling.top_logprobs:
            logits, temperature = output.logits[row, nodes], sampling.temperature or 1.0
            sequence.logprobs.append(TopLogprobs.of(logits, sampling.top_logprobs, temperature))
        if output.hidden:
            sequence.hidden = {layer: states[row, nodes] for layer, states in output.hidden.items()}

    def _admit(self, waiting: Iterator[Request]) -> Generator[GenerationResult, None, bool]:
        """Fill the free slots; requests that do not fit the context are answered at once.

        A sequence may be finished by the token that its prompt's forward gives.

        Returns:
            whether any request was taken.
        """
        entering = []
        while self._free:
            request = next(waiting, None)
            if request is None:
                break
            request = self.target.complete(request)
            room = self.target.room(request)
            if room < 1:
                yield GenerationResult(request.id, [], "context", GenerationStats(), [])
                continue
            slot = self._free.pop(0)
            sequence = _Sequence(
                request=request,
                slot=slot,
                limit=min(request.sampling.max_new_tokens, room),
                sampling=self._resolved(request.sampling),
                generator=generator_for(request.seed, request.id),
                length=len(request.prompt),
            )
            self._active.append(sequence)  # from here on the slot is given back, whatever happens
            self._buffer[slot, : sequence.length] = request.prompt
            entering.append(sequence)
        if not entering:
            return False
        with torch.inference_mode():
            shared = self._shared_prefixes(entering)
            self._prefill([sequence for sequence in entering if sequence.slot not in shared])
            for slot, (source, length) in shared.items():
                self.target.share(source, slot, length)
            self._prefill([sequence for sequence in entering if sequence.slot in shared])
        # Neighbouring slots are read without a copy, so the batch is kept in slot order.
        self._active.sort(key=lambda sequence: sequence.slot)
        yield from self._retire()
        return True

    def _shared_prefixes(self, entering: list[_Sequence]) -> dict[int, tuple[int, int]]:
        """Which prompts begin as another slot's text does: slot -> (that slot, tokens to copy).

        The other one was there before, or enters now and reads its prompt itself. Of drafters that
        want the states of every token each prompt is read whole, and that of an encoder-decoder
        model too: its keys hang on the source.
        """
        if self.drafter.hidden_layers or self.target.is_encoder_decoder:
            return {}
        newcomers = {sequence.slot for sequence in entering}
        sources = [sequence for sequence in self._active if sequence.slot not in newcomers]
        shared = {}
        for sequence in entering:
            best, length = -1, SHARED_FROM - 1
            for source in sources:
                # The last token of either is a root, whose keys are not cached, or must be read.
                room = min(source.length, sequence.length) - 1
                texts = self._buffer[[source.slot, sequence.slot], :room]
                differs = np.flatnonzero(texts[0] != texts[1])
                common = int(differs[0]) if len(differs) else room
                if common > length:
                    best, length = source.slot, common
            if best >= 0:
                shared[sequence.slot] = (best, length)
            else:
                sources.append(sequence)
        return shared

    def _resolved(self, sampling: SamplingParams) -> SamplingParams:
        """With what the target's generation config says where the request says nothing."""
        if sampling.repetition_penalty is not None or self.target.repetition_penalty == 1.0:
            return sampling
        return replace(sampling, repetition_penalty=self.target.repetition_penalty)

    def _prefill(self, sequences: list[_Sequence]) -> None:
        """Read the prompts; each one's forward gives its first token."""
        if not sequences:
            return
        started = self._now()
        prompts = [self._tokens[s.slot, : s.length].clone() for s in sequences]
        batch = _Batch(sequences, self._tokens)
        output, before = self.target.prefill(
            batch.slots,
            prompts,
            self.drafter.hidden_layers,
            sources=[sequence.request.source for sequence in sequences],
        )
        for sequence, prompt, hidden in zip(sequences, prompts, before, strict=True):
            if len(sequence.request.material):
                self.drafter.consult(sequence.slot, sequence.request.material)
            self.drafter.begin(sequence.slot, prompt, hidden)
            sequence.hidden = {layer: states[:0] for layer, states in hidden.items()}
        context = self._context(batch)
        roots = torch.tensor(context.roots, device=self.target.device)
        draft = Draft.chain(roots[:, None])
        self._conclude(batch, context, draft, output)
        spent = (self._now() - started) / len(sequences)
        for sequence in sequences:
            sequence.seconds["prefill"] += spent

    def _retire(self) -> Iterator[GenerationResult]:
        finished = [sequence for sequence in self._active if sequence.finish_reason]
        self._active = [sequence for sequence in self._active if not sequence.finish_reason]
        for sequence in finished:  # all of them first: the listener may stop at any result
            self._leave(sequence)
        for sequence in finished:
            stats = GenerationStats.of(sequence.steps)
            stats.expected_accepted = sequence.expected_accepted
            stats.seconds = dict(sequence.seconds)
            yield GenerationResult(
                sequence.request.id,
                sequence.output,
                sequence.finish_reason or "length",
                stats,
                sequence.steps,
                TopLogprobs.joined(sequence.logprobs),
            )

    def _leave(self, sequence: _Sequence) -> None:
        self.target.release(sequence.slot)
        self.drafter.end(sequence.slot, sequence.output)
        self._free = sorted([*self._free, sequence.slot])

    def _synchronised(self) -> float:
        torch.cuda.synchronize(self.target.device)
        return time.perf_counter()


def _records(
    sequences: list[_Sequence],
    context: Context,
    draft: Draft,
    acceptance: Acceptance,
    seconds: dict[str, float],
) -> Iterator[StepRecord]:
    """What a step did, behind it."""
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    sizes, lengths = draft.num_nodes.tolist(), context.lengths
    for row, sequence in enumerate(sequences):
        num_emitted = sequence.steps[-1].num_emitted
        yield StepRecord(
            request_id=sequence.request.id,
            step=len(sequence.steps),
            length=lengths[row],
            tokens=tokens[row][: sizes[row]],
            parents=parents[row][: sizes[row]],
            path=acceptance.paths[row][1:],
            emitted=sequence.output[len(sequence.output) - num_emitted :],
            seconds=seconds,
        )
