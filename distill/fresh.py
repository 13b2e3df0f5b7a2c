"""Batches of data that are partly written anew while training, and where these are kept.

What a writer writes at a step is a file of the run folder, written whole before the step is
trained. Later steps, other processes and a resumed run read it there, so that they all see the same
data. Processes on several machines need a folder that all of them see.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from distill.batches import Batch, BatchStream, Example, Pool
from distill.errors import UserError
from distill.joint import drafter_in
from distill.run_folder import write_text
from distill.target import LoadedTarget


class FreshStream:
    """Endless global batches, like `BatchStream`, over pools of which some are written anew.

    Whenever one is, the batches begin anew with new orders of all of them.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        target: LoadedTarget,
        folder: Path,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
    ):
        """Batches of `batch_size` packs of `sequence_length` places.

        Args:
            pools: those with a writer are written anew.
            target: for the writers.
            folder: gets what they write.
            sequence_length: prompt and output are no longer.
            batch_size: packs per step.
            seed: of orders, prompts and draws.
        """
        self.pools = list(pools)
        self.target = target
        self.folder = folder
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self._current: tuple[int, BatchStream] | None = None

    def is_due(self, step: int) -> bool:
        """Whether anything is to be written before this step."""
        return any(pool.writer is not None and step % pool.writer.every == 0 for pool in self.pools)

    def refresh(self, step: int, trained: nn.Module) -> None:
        """Write what is due before this step and not written yet; for the main process."""
        for number, pool in enumerate(self.pools):
            path = self._path(number, step)
            if pool.writer is None or step % pool.writer.every or path.is_file():
                continue
            written = pool.writer.write(
                pool.examples,
                drafter_in(trained),
                self.target,
                max_length=self.sequence_length,
                seed=self.seed,
                name=f"{number}:{step}",
            )
            write_examples(path, written)

    def for_process(self, step: int, rank: int, world: int, micro_batch_size: int) -> list[Batch]:
        """This process's share of a global batch; see `BatchStream.for_process`."""
        begin = max(step - step % pool.writer.every for pool in self.pools if pool.writer)
        if self._current is None or self._current[0] != begin:
            stream = BatchStream(
                [self._read(number, pool, begin) for number, pool in enumerate(self.pools)],
                sequence_length=self.sequence_length,
                batch_size=self.batch_size,
                seed=f"{self.seed}:{begin}",
            )
            self._current = begin, stream
        return self._current[1].for_process(step - begin, rank, world, micro_batch_size)

    def _read(self, number: int, pool: Pool, step: int) -> Pool:
        """The pool as it is from `step` on."""
        if pool.writer is None:
            return pool
        path = self._path(number, step - step % pool.writer.every)
        return replace(pool, examples=read_examples(path))

    def _path(self, number: int, step: int) -> Path:
        return self.folder / f"pool-{number}-step-{step:08}.jsonl"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """One example per line; the file appears whole."""
    lines = (
        json.dumps(
            {
                "prompt_ids": example.prompt_ids,
                "output_ids": example.output_ids,
                "learn_prompt": example.learn_prompt,
                "weights": example.weights,
                "encoder_ids": example.encoder_ids,
            }
        )
        for example in examples
    )
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_examples(path: Path) -> list[Example]:
    """What `write_examples` wrote.

    Raises:
        UserError: the file is gone or damaged.
    """
    try:
        return [Example(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"what was written while training cannot be read: {error}",
            path,
            "the drafter of that step is gone: train again in another output folder",
        ) from error
