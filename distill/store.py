"""Seq-KD rows on disk: keyed by content, in append-only shards that are written whole.

A row's key is a hash of all that decides it, so a run is resumed by key and never by count: order
does not matter, two writers never collide, and a row that two of them made is read once.
"""

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from distill.errors import UserError

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("prompt_id", pa.string()),
        ("source", pa.string()),
        ("encoder_ids", pa.list_(pa.int32())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("output_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("finish_reason", pa.string()),
        ("top_ids", pa.list_(pa.list_(pa.int32()))),
        ("top_logprobs", pa.list_(pa.list_(pa.float32()))),
        ("tail_mass", pa.list_(pa.float32())),
        ("top_temperature", pa.float64()),
    ]
)
PATTERN = "rows-*.parquet"
ADDED = {"encoder_ids", "top_temperature"}  # shards from before these columns have none of them
ABANDONED_SECONDS = 3600  # a shard is written in seconds


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and what the target wrote behind it.

    Attributes:
        key: content hash of what the row was made from.
        prompt_id: of the prompt.
        source: where the prompt comes from, for people.
        prompt_ids: token ids, BOS included where the model has one; of an encoder-decoder model
            what its decoder began with.
        output_ids: token ids, EOS included where it was produced.
        finish_reason: "eos", "stop" (a stop string) or "length".
        top_ids: the target's likeliest tokens at each output place, or None.
        top_logprobs: their log-probabilities.
        tail_mass: the probability of all other tokens at each output place.
        top_temperature: at which these are; None is 1.
        encoder_ids: what the encoder of an encoder-decoder model read; None of other models.
    """

    key: str
    prompt_id: str
    source: str
    prompt_ids: list[int]
    output_ids: list[int]
    finish_reason: str
    top_ids: list[list[int]] | None = None
    top_logprobs: list[list[float]] | None = None
    tail_mass: list[float] | None = None
    top_temperature: float | None = None
    encoder_ids: list[int] | None = None

    @property
    def loss_mask(self) -> list[int]:
        """1 where the token is the target's, 0 in the prompt; from ids, not from text."""
        return [0] * len(self.prompt_ids) + [1] * len(self.output_ids)


ROW_FIELDS = [field.name for field in fields(Row)]


def row_key(
    *,
    prompt_ids: Sequence[int],
    sampling: Mapping[str, Any],
    seed: int,
    target: str,
    template: str,
    encoder_ids: Sequence[int] = (),
) -> str:
    """The key of the row that these make."""
    made_from = {
        **({"encoder_ids": list(encoder_ids)} if len(encoder_ids) else {}),
        "prompt_ids": list(prompt_ids),
        "sampling": dict(sampling),
        "seed": seed,
        "target": target,
        "template": template,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


class RowStore:
    """A folder of shards. Any number of readers and writers may have it open."""

    def __init__(self, folder: Path):
        """The store in `folder`, which appears with the first shard."""
        self.folder = folder

    def shards(self) -> list[Path]:
        """Finished shards; files that are still being written are none."""
        return sorted(self.folder.glob(PATTERN))

    def keys(self) -> set[str]:
        """Keys of all rows."""
        return {
            key
            for shard in self.shards()
            for key in _read(shard, columns=["key"]).column("key").to_pylist()
        }

    def __len__(self) -> int:
        """Different rows."""
        return len(self.keys())

    def rows(self) -> Iterator[Row]:
        """Every row once, shard by shard.

        Raises:
            UserError: a shard is damaged.
        """
        seen = set()
        for shard in self.shards():
            for record in _read(shard, columns=ROW_FIELDS).to_pylist():
                if record["key"] not in seen:
                    seen.add(record["key"])
                    yield Row(**record)

    def append(self, rows: Sequence[Row]) -> Path:
        """Write `rows` as one shard: whole, or not at all.

        Raises:
            UserError: the disk is full; what was written before stays.
        """
        records = [
            {**{name: getattr(row, name) for name in ROW_FIELDS}, "loss_mask": row.loss_mask}
            for row in rows
        ]
        names = hashlib.sha256("".join(sorted(row.key for row in rows)).encode()).hexdigest()[:16]
        shard = self.folder / f"rows-{names}.parquet"
        partial = self.folder / f".{shard.name}.{os.getpid()}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                pq.write_table(pa.Table.from_pylist(records, schema=SCHEMA), file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(shard)
            _sync_folder(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    "the disk is full; the rows written so far are kept",
                    self.folder,
                    "free some space and run the same command again",
                ) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        return shard

    def remove_abandoned(self) -> None:
        """Remove what writers that were killed more than an hour ago left half-written."""
        for partial in self.folder.glob(".rows-*.partial"):
            with contextlib.suppress(
                FileNotFoundError
            ):  # its writer finished it, or another did this
                if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                    partial.unlink()

    def dataset(self) -> Dataset:
        """The rows as a `datasets` dataset; an empty one where there are none."""
        if not self.shards():
            return Dataset(SCHEMA.empty_table())
        tables = [SCHEMA.empty_table(), *(_read(shard) for shard in self.shards())]
        table = pa.concat_tables(tables, promote_options="default")
        keys = table.column("key").to_pylist()
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return Dataset(table.take(sorted(first.values())))

    def content_hash(self) -> str:
        """Hash of the rows, however they are spread over shards and in whatever order."""
        digests = sorted(
            hashlib.sha256(f"{row.key}{row.output_ids}{row.finish_reason}".encode()).digest()
            for row in self.rows()
        )
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]

    def verify(self) -> int:
        """Read everything back; returns the number of rows.

        Raises:
            UserError: a shard cannot be read, or a row contradicts itself.
        """
        count = 0
        for row in self.rows():
            count += 1
            for kept in (row.top_ids, row.top_logprobs, row.tail_mass):
                if kept is not None and len(kept) != len(row.output_ids):
                    raise UserError(
                        f"row {row.key} has {len(row.output_ids)} output tokens but "
                        f"log-probabilities for {len(kept)}",
                        self.folder,
                        "generate it again",
                    )
        return count


class RowWriter:
    """Collects rows and appends them as shards, also when it is left by an error or Ctrl-C."""

    def __init__(self, store: RowStore, *, rows_per_shard: int = 512, seconds: float = 60.0):
        """Write to `store` after `rows_per_shard` rows or `seconds`, whichever comes first.

        In the beginning rows are written sooner: nothing waits for longer than a tenth of the time
        that the job has taken, or a second.
        """
        self.store = store
        self.rows_per_shard = rows_per_shard
        self.seconds = seconds
        self._rows: list[Row] = []
        self._begun = self._since = time.monotonic()

    def add(self, row: Row) -> None:
        """Take a row."""
        self._rows.append(row)
        now = time.monotonic()
        is_late = now - self._since >= min(self.seconds, max(1.0, (now - self._begun) / 10))
        if len(self._rows) >= self.rows_per_shard or is_late:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if self._rows:
            self.store.append(self._rows)
        self._rows, self._since = [], time.monotonic()

    def __enter__(self) -> Self:
        """Begin."""
        self.store.remove_abandoned()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the rest."""
        self.flush()


def _read(shard: Path, columns: list[str] | None = None) -> pa.Table:
    """The shard's rows; what came later than it is left out of the columns."""
    try:
        if columns is not None and not ADDED.isdisjoint(columns):
            missing = ADDED.difference(pq.read_schema(shard).names)
            columns = [column for column in columns if column not in missing]
        return pq.read_table(shard, columns=columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"the shard is damaged: {str(error).splitlines()[0]}",
            shard,
            "remove this file and run `draftsmith generate` again: only its rows are made anew",
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
