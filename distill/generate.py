"""`draftsmith generate`: the target writes outputs for the user's prompts (Seq-KD)."""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch

from decode import SamplingParams, lay_out_for_decoding
from distill.config import command
from distill.errors import UserError
from distill.progress import Progress
from distill.prompts import Prompt, PromptSettings, StandardLibraryPrompts
from distill.run_folder import RunFolder, describe
from distill.store import RowStore, RowWriter
from distill.target import TargetSettings
from distill.teachers.local import LocalTeacher


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write Seq-KD rows: the target's outputs for the prompts.

    Attributes:
        target: who writes.
        prompts: what is continued.
        sampling: how.
        output: the run folder; rows go to its `rows/`.
        num_samples: outputs per prompt; more than one needs a temperature.
        batch_size: sequences decoded at a time; it does not change the rows.
        rows_per_shard: rows are on disk after this many, or after a minute; sooner at first.
        num_threads: CPU threads; None leaves torch's choice.
        seed: of the draws.
    """

    target: TargetSettings = field(default_factory=TargetSettings)
    prompts: PromptSettings = field(default_factory=StandardLibraryPrompts)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    output: Path
    num_samples: int = 1
    batch_size: int = 16
    rows_per_shard: int = 512
    num_threads: int | None = None
    seed: int = 0

    def run(self) -> Path:
        """Write every row that is not there yet; returns the folder of the rows.

        Raises:
            UserError: the prompts or the target cannot be used, or the folder holds other work.
        """
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise UserError(
                f"num_samples={self.num_samples} greedy outputs of a prompt are all the same",
                hint="set sampling.temperature above 0, or num_samples=1",
            )
        folder = RunFolder(self.output, self._settings())
        summary = folder.begin()
        rows = self.output / "rows"
        if summary is not None:
            print(f"{self.output} is finished: {summary['rows']:,} rows in {rows}")
            return rows
        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        target = self.target.load(may_have_encoder=True)
        lay_out_for_decoding(target.model)
        prompts = self.prompts.load(target.tokenizer)
        longest = max(len(prompt.ids) for prompt in prompts)
        template = target.tokenizer.chat_template or ""
        teacher = LocalTeacher(
            target,
            self.sampling,
            seed=self.seed,
            batch_size=self.batch_size,
            max_length=target.cache_length(longest, self.sampling.max_new_tokens),
            template=hashlib.sha256(str(template).encode()).hexdigest()[:16],
        )
        store = RowStore(rows)
        self._write(teacher, store, prompts)
        num_rows, num_tokens, reasons = 0, 0, dict[str, int]()
        for row in store.rows():
            num_rows += 1
            num_tokens += len(row.output_ids)
            reasons[row.finish_reason] = reasons.get(row.finish_reason, 0) + 1
        folder.finish(
            {
                "rows": num_rows,
                "output_tokens": num_tokens,
                "finish_reasons": reasons,
                "content_hash": store.content_hash(),
                "target": target.path,
                "target_fingerprint": target.fingerprint,
            }
        )
        print(f"{num_rows:,} rows, {num_tokens:,} output tokens in {rows}")
        return rows

    def _settings(self) -> dict[str, object]:
        """What decides the rows: not how fast they are made."""
        settings = describe(self)
        for name in ("output", "batch_size", "rows_per_shard", "num_threads"):
            del settings[name]
        return dict(settings)

    def _write(self, teacher: LocalTeacher, store: RowStore, prompts: list[Prompt]) -> None:
        wanted = list(itertools.product(prompts, range(self.num_samples)))
        there = store.keys()
        missing = [pair for pair in wanted if teacher.key(*pair) not in there]
        if there:
            print(f"{len(wanted) - len(missing):,} of {len(wanted):,} rows are there already")
        with (
            RowWriter(store, rows_per_shard=self.rows_per_shard) as writer,
            Progress(len(wanted), unit="rows", label="generate") as progress,
        ):
            progress.skip(len(wanted) - len(missing))
            too_long = 0
            for row in teacher.generate(missing):
                if row.finish_reason == "context":
                    too_long += 1
                else:
                    writer.add(row)
                progress.advance(1, tokens=len(row.output_ids))
        if too_long:
            print(f"{too_long:,} prompts leave no room for an output in the target's context")


main = command("generate", Generate)

if __name__ == "__main__":
    main()
