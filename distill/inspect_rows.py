"""`draftsmith inspect`: look at rows, and refuse those that would teach the wrong thing."""

import enum
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distill.config import command
from distill.errors import UserError
from distill.store import Row, RowStore
from distill.target import TargetSettings

GREY, GREEN, RESET = "\033[90m", "\033[32m", "\033[0m"


class Color(enum.Enum):
    """When colours are printed."""

    auto = "auto"  # on a terminal
    always = "always"
    never = "never"


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print rows of a store and check all of them.

    Attributes:
        rows: the store's folder, or the run folder of `draftsmith generate`.
        target: whose tokenizer reads them.
        limit: how many are printed; all are checked.
        color: prompt in grey, completion in green.
    """

    rows: Path
    target: TargetSettings = field(default_factory=TargetSettings)
    limit: int = 3
    color: Color = Color.auto

    def run(self) -> None:
        """Print, count, check.

        Raises:
            UserError: naming the first row that is wrong, and how many are.
        """
        folder = self.rows / "rows" if (self.rows / "rows").is_dir() else self.rows
        store = RowStore(folder)
        if not store.shards():
            raise UserError("there are no rows", folder, "run `draftsmith generate` first")
        tokenizer = self.target.load_tokenizer()
        is_colored = self.color is Color.always or (
            self.color is Color.auto and sys.stdout.isatty()
        )
        wrong: list[tuple[Row, str]] = []
        reasons: Counter[str] = Counter()
        num_tokens = 0
        for index, row in enumerate(store.rows()):
            if index < self.limit:
                print(render(row, tokenizer, is_colored=is_colored))
            wrong += [(row, problem) for problem in problems(row, row.loss_mask, tokenizer)]
            reasons[row.finish_reason] += 1
            num_tokens += len(row.output_ids)
        total = sum(reasons.values())
        ends = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        print(
            f"{total:,} rows in {len(store.shards())} shards, {num_tokens:,} output tokens "
            f"({num_tokens / total:.1f} a row); finished by: {ends}"
        )
        if wrong:
            row, problem = wrong[0]
            raise UserError(
                f"{len(wrong):,} problems, the first: row {row.key} {problem}",
                folder,
                "generate these rows again with the right tokenizer and template",
            )


def problems(
    row: Row, loss_mask: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """What is wrong with a row, as the end of a sentence that begins with it."""
    if len(loss_mask) != len(row.prompt_ids) + len(row.output_ids):
        yield f"has {len(loss_mask)} places in its mask"
    if all(loss_mask):
        yield "has a loss mask of ones: its prompt would be learnt as the target's output"
    if not any(loss_mask):
        yield "has a loss mask of zeros: nothing would be learnt from it"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = list((row.encoder_ids or row.prompt_ids)[:2])
    if bos is not None and begins == [bos, bos] and bos != eos:
        yield "begins with two BOS tokens: the template and the tokenizer both wrote one"
    if row.finish_reason == "eos" and eos is not None:
        special = set(tokenizer.all_special_ids)
        if not row.output_ids or row.output_ids[-1] not in special:
            yield "was ended by EOS but does not hold it: the drafter would not learn to stop"
    if eos is not None and eos in row.output_ids[:-1]:
        yield "has EOS in the middle of its output"


def render(row: Row, tokenizer: PreTrainedTokenizerBase, *, is_colored: bool) -> str:
    """A row as text: key, prompt, completion, mask."""
    grey, green, reset = (GREY, GREEN, RESET) if is_colored else ("", "", "")
    prompt, output = tokenizer.decode(row.prompt_ids), tokenizer.decode(row.output_ids)
    source = f"{tokenizer.decode(row.encoder_ids)}\n→ " if row.encoder_ids else ""
    logprobs = "" if row.top_ids is None else f", top-{len(row.top_ids[0])} log-probabilities"
    return (
        f"── row {row.key}  {row.source}  finished by {row.finish_reason}{logprobs}\n"
        f"{grey}{source}{prompt}{reset}{'' if is_colored else '┃'}{green}{output}{reset}\n"
        f"mask: {runs(row.loss_mask)}\n"
    )


def runs(mask: Sequence[int]) -> str:
    """A mask in short: "0 x 12, 1 x 96"."""
    parts: list[list[int]] = []
    for value in mask:
        if parts and parts[-1][0] == value:
            parts[-1][1] += 1
        else:
            parts.append([value, 1])
    return ", ".join(f"{value} x {count}" for value, count in parts)


main = command("inspect", Inspect)

if __name__ == "__main__":
    main()
