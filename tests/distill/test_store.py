"""Rows on disk: whole shards, one row per key, nothing lost."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from distill.errors import UserError
from distill.store import Row, RowStore, RowWriter, row_key


def row(number: int, *, output: tuple[int, ...] = (7, 8)) -> Row:
    return Row(f"key{number:03}", f"p{number}", "here:1", [0, number], list(output), "length")


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    with_top = Row("k", "p", "s", [0, 5], [6], "eos", [[6, 2]], [[-0.5, -1.5]], [0.25])
    store.append([row(1), with_top])
    assert sorted(store.rows(), key=lambda r: r.key) == [with_top, row(1)]
    assert row(1).loss_mask == [0, 0, 1, 1]
    assert store.verify() == 2


def test_a_row_that_two_writers_made_is_read_once(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([row(1), row(2)])
    store.append([row(2), row(3)])
    assert [r.key for r in sorted(store.rows(), key=lambda r: r.key)] == [
        "key001",
        "key002",
        "key003",
    ]
    assert len(store.dataset()) == len(store) == 3
    assert "loss_mask" in store.dataset().column_names


def test_the_content_hash_does_not_know_shards_or_order(tmp_path: Path) -> None:
    one, two = RowStore(tmp_path / "one"), RowStore(tmp_path / "two")
    one.append([row(1), row(2), row(3)])
    two.append([row(3)])
    two.append([row(2), row(1)])
    assert one.content_hash() == two.content_hash()
    two.append([row(4)])
    assert one.content_hash() != two.content_hash()


def test_the_key_hangs_on_all_that_decides_the_row() -> None:
    made_from = {
        "prompt_ids": [1, 2],
        "sampling": {"temperature": 0.0},
        "seed": 0,
        "target": "t",
        "template": "",
    }
    changes = {"prompt_ids": [1], "sampling": {"temperature": 1.0}, "seed": 1, "target": "u"}
    keys = {row_key(**made_from)} | {  # type: ignore[arg-type]
        row_key(**{**made_from, name: value})  # type: ignore[arg-type]
        for name, value in changes.items()
    }
    assert len(keys) == 5


def test_an_encoders_text_is_part_of_the_key_where_there_is_one() -> None:
    """The keys of rows without one are those that stores have on disk."""
    made_from = {"prompt_ids": [1], "sampling": {}, "seed": 0, "target": "t", "template": ""}
    text = '{"prompt_ids": [1], "sampling": {}, "seed": 0, "target": "t", "template": ""}'
    own = row_key(**made_from)  # type: ignore[arg-type]
    assert own == hashlib.sha256(text.encode()).hexdigest()[:32]
    others = [row_key(**made_from, encoder_ids=ids) for ids in ([2], [3])]  # type: ignore[arg-type]
    assert len({own, *others}) == 3


def test_shards_from_before_there_were_sources_are_read(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    old = store.append([row(1)])
    pq.write_table(pq.read_table(old).drop_columns(["encoder_ids", "top_temperature"]), old)
    assert list(store.rows()) == [row(1)]
    new = replace(row(2), encoder_ids=[9, 8, 7])
    store.append([new])
    assert sorted(store.rows(), key=lambda r: r.key) == [row(1), new]
    assert new.loss_mask == [0, 0, 1, 1]  # of the decoder's text alone
    columns = store.dataset().to_dict()
    found = dict(zip(columns["key"], columns["encoder_ids"], strict=True))
    assert found == {"key001": None, "key002": [9, 8, 7]}
    assert store.verify() == 2


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    shard = store.append([row(1)])
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(UserError, match=shard.name):
        list(store.rows())


def test_a_full_disk_leaves_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RowStore(tmp_path)
    store.append([row(1)])

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            store.append([row(2)])
    assert store.keys() == {"key001"}
    assert [path.name for path in tmp_path.iterdir()] == [store.shards()[0].name]


def test_the_writer_keeps_its_rows_when_it_is_left_by_an_error(tmp_path: Path) -> None:
    store = RowStore(tmp_path)

    def fail() -> None:
        with RowWriter(store, rows_per_shard=100) as writer:
            writer.add(row(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert store.keys() == {"key001"}


WRITER = """
import sys
from pathlib import Path
from distill.store import Row, RowStore
store = RowStore(Path(sys.argv[1]))
number = len(store)
print("begun", flush=True)
while True:
    store.append([Row(f"key{number}", "p", "s", [0], [1] * 50, "length")])
    number += 1
"""


def test_a_killed_writer_leaves_whole_shards_only(tmp_path: Path) -> None:
    for wait in (0.05, 0.11, 0.23):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = RowStore(tmp_path)
        assert store.verify() == len(store.shards()) > 0


def test_shards_are_whole_with_and_without_log_probabilities(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    store.append([row(1)])
    store.append([Row("k", "p", "s", [0], [6, 7], "eos", [[6], [7]], [[-0.5], [-1.5]], [0.25, 0])])
    columns = store.dataset().to_dict()
    assert set(columns) >= {"prompt_ids", "output_ids", "loss_mask", "top_ids"}
    masks = dict(zip(columns["key"], columns["loss_mask"], strict=True))
    assert masks == {"key001": [0, 0, 1, 1], "k": [0, 1, 1]}
    assert {found.key: found.top_ids for found in store.rows()} == {
        "key001": None,
        "k": [[6], [7]],
    }


@pytest.mark.parametrize("short", ["top_ids", "top_logprobs", "tail_mass"])
def test_log_probabilities_of_other_lengths_are_named(short: str, tmp_path: Path) -> None:
    full = {"top_ids": [[6]] * 2, "top_logprobs": [[-0.5]] * 2, "tail_mass": [0.25] * 2}
    wrong = replace(row(1), **{**full, short: full[short][:1]})  # type: ignore[arg-type]
    store = RowStore(tmp_path)
    store.append([wrong])
    with pytest.raises(UserError, match="key001 has 2 output tokens but log-probabilities for 1"):
        store.verify()


def test_a_store_without_rows_is_an_empty_dataset(tmp_path: Path) -> None:
    empty = RowStore(tmp_path / "nothing")
    assert len(empty.dataset()) == len(empty) == empty.verify() == 0
    empty_columns = set(empty.dataset().column_names)
    other = RowStore(tmp_path)
    other.append([row(1)])
    assert set(other.dataset().column_names) == empty_columns


def test_a_writer_clears_away_what_was_abandoned_and_nothing_else(tmp_path: Path) -> None:
    abandoned, fresh = (
        tmp_path / ".rows-a.parquet.1.partial",
        tmp_path / ".rows-b.parquet.2.partial",
    )
    for partial in (abandoned, fresh):
        partial.write_bytes(b"half")
    long_ago = time.time() - 2 * 3600
    os.utime(abandoned, (long_ago, long_ago))
    with RowWriter(RowStore(tmp_path)) as writer:
        writer.add(row(1))
    assert not abandoned.exists()
    assert fresh.exists()
    assert len(RowStore(tmp_path)) == 1


def test_the_same_rows_are_the_same_shard(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    assert store.append([row(1), row(2)]) == store.append([row(2), row(1)])
    assert len(store.shards()) == 1


def test_a_full_disk_under_the_writer_and_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RowStore(tmp_path)

    def write(numbers: range) -> None:
        with RowWriter(store, rows_per_shard=2, seconds=3600) as writer:
            for number in numbers:
                writer.add(row(number))

    def full(handle: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    write(range(2))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk is full"):
            write(range(2, 5))
    assert store.keys() == {"key000", "key001"}
    write(range(2, 5))
    assert len(store) == 5
    assert store.verify() == 5
    assert not [path for path in tmp_path.iterdir() if path not in store.shards()]


def test_other_errors_of_the_disk_are_not_called_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        RowStore(tmp_path).append([row(1)])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_behind_is_no_shard(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    shard = store.append([row(1)])
    (tmp_path / f".{shard.name}.123.partial").write_bytes(shard.read_bytes()[:100])
    assert store.shards() == [shard]
    assert store.verify() == 1
