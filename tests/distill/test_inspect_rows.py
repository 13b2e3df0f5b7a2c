"""Rows that would teach the wrong thing are refused by name."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.errors import UserError
from distill.inspect_rows import Color, Inspect, problems, render, runs
from distill.store import Row, RowStore
from distill.target import TargetSettings

BOS, EOS = 0, 1
GOOD = Row("k", "p", "here:1", [BOS, 5, 6], [7, EOS], "eos")
TOKENIZER: Any = SimpleNamespace(
    bos_token_id=BOS,
    eos_token_id=EOS,
    all_special_ids=[BOS, EOS],
    decode=lambda ids: " ".join(map(str, ids)),
)


def test_a_good_row_has_no_problems() -> None:
    assert not list(problems(GOOD, GOOD.loss_mask, TOKENIZER))
    cut = replace(GOOD, output_ids=[7, 8], finish_reason="length")
    assert not list(problems(cut, cut.loss_mask, TOKENIZER))


@pytest.mark.parametrize(
    ("row", "mask", "problem"),
    [
        (GOOD, [1] * 5, "mask of ones"),
        (GOOD, [0] * 5, "mask of zeros"),
        (GOOD, [0, 1], "2 places in its mask"),
        (replace(GOOD, prompt_ids=[BOS, BOS, 5]), None, "two BOS"),
        (replace(GOOD, encoder_ids=[BOS, BOS, 5]), None, "two BOS"),
        (replace(GOOD, output_ids=[7, 8]), None, "ended by EOS but does not hold it"),
        (replace(GOOD, output_ids=[7, EOS, 8, EOS]), None, "EOS in the middle"),
    ],
)
def test_each_fault_is_named(row: Row, mask: list[int] | None, problem: str) -> None:
    found = list(problems(row, mask or row.loss_mask, TOKENIZER))
    assert any(problem in text for text in found)


def test_prompt_completion_and_mask_are_told_apart() -> None:
    assert runs([0, 0, 0, 1, 1]) == "0 x 3, 1 x 2"
    plain = render(GOOD, TOKENIZER, is_colored=False)
    assert "0 5 6┃7 1" in plain
    assert "\033" not in plain
    assert "\033[32m7 1\033[0m" in render(GOOD, TOKENIZER, is_colored=True)
    translated = replace(GOOD, encoder_ids=[8, 9], prompt_ids=[BOS])
    assert "8 9\n→ 0┃7 1\nmask: 0 x 1, 1 x 2" in render(translated, TOKENIZER, is_colored=False)


def test_the_command_counts_rows_and_refuses_bad_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TargetSettings, "load_tokenizer", lambda self: TOKENIZER)
    store = RowStore(tmp_path / "rows")
    store.append([GOOD])
    Inspect(rows=tmp_path, color=Color.never).run()
    assert "1 rows in 1 shards, 2 output tokens" in capsys.readouterr().out
    store.append([replace(GOOD, key="bad", prompt_ids=[BOS, BOS])])
    with pytest.raises(UserError, match="row bad begins with two BOS"):
        Inspect(rows=tmp_path).run()
    with pytest.raises(UserError, match="there are no rows"):
        Inspect(rows=tmp_path / "none").run()


def test_all_rows_are_checked_though_few_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TargetSettings, "load_tokenizer", lambda self: TOKENIZER)
    rows = [replace(GOOD, key=f"k{i}") for i in range(4)]
    rows += [replace(GOOD, key=f"bad{i}", output_ids=[7, 8]) for i in range(2)]
    RowStore(tmp_path).append(rows)
    with pytest.raises(UserError, match="2 problems, the first: row bad0 was ended by EOS"):
        Inspect(rows=tmp_path, limit=1, color=Color.never).run()
    printed = capsys.readouterr().out
    assert printed.count("── row") == 1
    assert "6 rows in 1 shards, 12 output tokens (2.0 a row); finished by: 6 eos" in printed


def test_a_tokenizer_whose_bos_is_its_eos_is_no_fault() -> None:
    one: Any = SimpleNamespace(bos_token_id=1, eos_token_id=1, all_special_ids=[1])
    assert not list(problems(replace(GOOD, prompt_ids=[1, 1, 5]), GOOD.loss_mask, one))
    bare: Any = SimpleNamespace(bos_token_id=None, eos_token_id=None, all_special_ids=[])
    assert not list(problems(GOOD, GOOD.loss_mask, bare))
