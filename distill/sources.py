"""Examples as a target with an encoder reads them: prompts are sources there."""

from collections.abc import Sequence
from dataclasses import replace

from decode import decoder_prompt
from distill.batches import Example, Pool
from distill.errors import UserError
from distill.target import LoadedTarget


def read_by(target: LoadedTarget, pools: Sequence[Pool]) -> list[Pool]:
    """The pools with every example as `target` reads it.

    Rows that an encoder-decoder model wrote stay as they are. What stands behind a prompt in other
    data is made of the prompt: the encoder reads it, and the decoder begins as the target's does.
    Sources that the encoder has no room for are left out.

    Raises:
        UserError: the examples are for an encoder and there is none, or prompts were to be learnt,
            or nothing is left.
    """
    examples = [example for pool in pools for example in pool.examples]
    if not target.is_encoder_decoder:
        if any(example.encoder_ids is not None for example in examples):
            raise UserError(
                f"the data are an encoder-decoder model's, and {type(target.model).__name__} has "
                "no encoder",
                hint="generate rows with this target",
            )
        return list(pools)
    if any(example.learn_prompt for example in examples):
        raise UserError(
            "an encoder-decoder target reads prompts and never writes them, so they cannot be "
            "learnt",
            hint="data.learn_prompt=false",
        )
    try:
        begins = decoder_prompt(target.model)
    except ValueError as error:
        raise UserError(str(error), target.path) from error
    read = [[_with_source(example, begins) for example in pool.examples] for pool in pools]
    kept = [[e for e in found if target.fits(len(e.asked), 1)] for found in read]
    if left_out := len(examples) - sum(map(len, kept)):
        print(f"{left_out:,} examples are left out: the target's encoder has no room for them")
    if not all(kept):
        raise UserError(
            "the target's encoder has no room for any of the examples", hint="give shorter prompts"
        )
    return [replace(pool, examples=found) for pool, found in zip(pools, kept, strict=True)]


def _with_source(example: Example, begins: Sequence[int]) -> Example:
    if example.encoder_ids is not None:
        return example
    return replace(example, encoder_ids=example.prompt_ids, prompt_ids=list(begins))
