"""The target, loaded here, writes outputs: sequence-level distillation (Kim & Rush 2016)."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict

from decode import GenerationResult, Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import NoDrafter
from distill.prompts import Prompt
from distill.store import Row, row_key
from distill.target import LoadedTarget


class LocalTeacher:
    """Generates rows with our own decoder, as many sequences at a time as it has slots."""

    def __init__(
        self,
        target: LoadedTarget,
        sampling: SamplingParams,
        *,
        seed: int,
        batch_size: int,
        max_length: int | None = None,
        template: str = "",
    ):
        """A teacher that samples as told.

        Args:
            target: who writes.
            sampling: how.
            seed: of the run; with the row's key it fixes each row's draws.
            batch_size: sequences at a time; it does not change the rows.
            max_length: longest prompt and output together; sizes the cache.
            template: hash of the chat template the prompts were rendered with.
        """
        self.target = target
        self.sampling = sampling
        self.seed = seed
        self.template = template
        self.decoder = SpeculativeDecoder(
            Target(target.model, max_batch_size=batch_size, max_length=max_length),
            NoDrafter(),
            tokenizer=target.tokenizer,
        )

    def key(self, prompt: Prompt, sample: int) -> str:
        """The row's key: what it is made from, and nothing of when or beside what."""
        encoder_ids, prompt_ids = self._texts(prompt)
        return row_key(
            encoder_ids=encoder_ids,
            prompt_ids=prompt_ids,
            sampling={**asdict(self.sampling), "sample": sample},
            seed=self.seed,
            target=self.target.fingerprint,
            template=self.template,
        )

    def generate(self, wanted: Iterable[tuple[Prompt, int]]) -> Iterator[Row]:
        """Rows for (prompt, sample index) pairs, as they are finished."""
        running: dict[str, Prompt] = {}

        def requests() -> Iterator[Request]:
            for prompt, sample in wanted:
                key = self.key(prompt, sample)
                running[key] = prompt
                yield self.decoder.target.request(
                    prompt.ids, id=key, sampling=self.sampling, seed=self.seed
                )

        for result in self.decoder.stream(requests()):
            yield self._row(running.pop(result.request_id), result)

    def _texts(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """What an encoder reads, if there is one, and what the output is written behind."""
        if self.target.is_encoder_decoder:
            return prompt.ids, self.decoder.target.decoder_prompt()
        return [], prompt.ids

    def _row(self, prompt: Prompt, result: GenerationResult) -> Row:
        encoder_ids, prompt_ids = self._texts(prompt)
        top = result.top_logprobs
        return Row(
            key=result.request_id,
            prompt_id=prompt.id,
            source=prompt.source,
            encoder_ids=encoder_ids or None,
            prompt_ids=prompt_ids,
            output_ids=result.tokens,
            finish_reason=result.finish_reason,
            top_ids=None if top is None else top.ids.tolist(),
            top_logprobs=None if top is None else top.logprobs.tolist(),
            tail_mass=None if top is None else top.tail_mass.tolist(),
            top_temperature=None if top is None else self.sampling.temperature or 1.0,
        )
