"""Encoder-decoder targets by config: their prompts are sources; no drafter is trained for them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from decode import SamplingParams
from decode.certificate import greedy_output
from decode.drafters import PromptLookup
from distill.errors import UserError
from distill.evaluate import Evaluate
from distill.generate import Generate
from distill.prompts import DatasetPrompts
from distill.store import RowStore
from distill.target import TargetSettings
from tests.distill.tiny import save_word_tokenizer, t5

VOCAB_SIZE = 50
SAMPLING = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two T5 models, "target" and "near", and prompts."""
    root = tmp_path_factory.mktemp("t5")
    model = t5(VOCAB_SIZE)
    for name, noise in (("target", 0.0), ("near", 0.02)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        save_word_tokenizer(root / name, VOCAB_SIZE)
    prompts = [
        {"prompt": " ".join(f"t{3 + (i * 7 + j * j) % 46}" for j in range(3 + i))} for i in range(5)
    ]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return root


def common(root: Path) -> dict[str, object]:
    return {
        "target": TargetSettings(path=str(root / "target")),
        "prompts": DatasetPrompts(path=str(root / "prompts.jsonl")),
        "sampling": SAMPLING,
    }


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_evaluation_certifies_and_compares(root: Path, tmp_path: Path, batch_size: int) -> None:
    Evaluate(
        **common(root),
        drafters={"near": str(root / "near")},
        model_free={"lookup": PromptLookup()},
        certify=True,
        batch_size=batch_size,
        num_resamples=100,
        output=tmp_path,
    ).run()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["drafters"]["near"]["block_efficiency"]["value"] > 1.1
    assert all(figures["mismatches"] == 0 for figures in results["drafters"].values())
    certificates = json.loads((tmp_path / "certificate.json").read_text())
    assert all(found["mismatches"] == [] for found in certificates.values())
    outputs: dict[str, dict[str, list[int]]] = {}
    for line in (tmp_path / "measurements.jsonl").read_text().splitlines():
        measured = json.loads(line)
        for output in measured["outputs"]:
            outputs.setdefault(measured["mode"], {})[output["prompt_id"]] = output["tokens"]
    assert len(outputs) == (4 if batch_size == 1 else 3)  # transformers' own is among them
    assert all(texts == outputs["near"] for texts in outputs.values())


def test_rows_are_the_targets_own_outputs(root: Path, tmp_path: Path) -> None:
    rows = list(RowStore(Generate(**common(root), output=tmp_path).run()).rows())
    assert len(rows) == 5
    model = AutoModelForSeq2SeqLM.from_pretrained(root / "target", dtype=torch.float32)
    for row in rows:
        assert row.prompt_ids == [0]
        assert row.output_ids == greedy_output(model, row.encoder_ids, 12)


def test_training_for_them_is_refused_in_a_sentence(root: Path) -> None:
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        TargetSettings(path=str(root / "target")).load()
