"""Outputs that drafters have seen before an evaluation begins: its warm start."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from distill.batches import FixedData, SeqKD
from distill.errors import UserError
from distill.prompts import Prompt
from distill.run_folder import content_hash
from distill.store import RowStore


def past_outputs(
    data: FixedData,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    drafters: Iterable[object],
) -> list[list[int]]:
    """The outputs of `data`, but for those of the prompts that are evaluated.

    Raises:
        UserError: there are none, or no drafter learns from them.
    """
    if not any(hasattr(drafter, "learn") for drafter in drafters):
        raise UserError(
            "past outputs are given, but no drafter learns from outputs",
            hint="add one that does, such as model_free=[suffix], or leave out data@past",
        )
    if isinstance(data, SeqKD) and data.rows is None:
        raise UserError("past.rows names no folder", hint="past.rows=runs/.../rows")
    evaluated = {tuple(prompt.ids) for prompt in prompts}
    examples = data.examples(tokenizer)
    outputs = [e.output_ids for e in examples if tuple(e.asked) not in evaluated]
    if not outputs:
        raise UserError(
            "the past has no outputs but those of the prompts that are evaluated",
            hint="give other prompts, or other rows",
        )
    if left_out := len(examples) - len(outputs):
        print(f"{left_out} past outputs are left out: their prompts are evaluated")
    return outputs


def past_hash(data: FixedData) -> str | None:
    """Hash of what is in a row store, which may grow; None of other data."""
    if not isinstance(data, SeqKD) or data.rows is None:
        return None
    return content_hash(sorted(RowStore(data.rows).keys()))
