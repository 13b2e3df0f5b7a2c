"""The script that made the embedded target, on three small texts and for seconds."""

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

import train_embedded_target

from distill.standard_library import Piece

SIZES = ["--layers", "1", "--hidden", "64", "--vocab", "300", "--batch-tokens", "1024"]


def test_it_leaves_a_model_and_its_card_and_trains_no_more_when_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(60))

    def pieces(split: str) -> list[Piece]:
        return [Piece(split, n, f"# {split}, {n}\n{text}") for n in range(3)]

    monkeypatch.setattr(train_embedded_target, "pieces", pieces)
    monkeypatch.setattr("distill.prompts.pieces", pieces)
    out = tmp_path / "target"
    times = ["--minutes", "0.02", "--finish-minutes", "0.02", "--threads", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), *SIZES, *times])
    train_embedded_target.main()

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) <= model.config.vocab_size == 300
    facts = json.loads((out / "training.json").read_text())
    assert facts["steps"] > facts["finish_steps"] > 0
    assert facts["seconds"] > facts["finish_seconds"] > 0
    card = (out / "README.md").read_text()
    assert f"{facts['loops']} end in a loop" in card
    assert card.count("# <- the prompt ends here") == facts["continuations"] == 3

    train_embedded_target.main()
    assert json.loads((out / "training.json").read_text()) == facts
