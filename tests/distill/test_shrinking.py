"""Drafters that the data make smaller: chosen, trained, resumed, exported, drafting."""

import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from decode import SamplingParams
from decode.models import CheckpointLM, Medusa, PrunedLM, load_lm
from distill.batches import Example, SeqKD
from distill.errors import UserError
from distill.export import Export
from distill.generate import Generate
from distill.objectives import CrossEntropy, ForwardKL, LKLambda
from distill.shrinking import VocabularySettings, frequent_ids, in_words, learnt_counts
from distill.target import TargetSettings
from distill.teachers.stored import StoredTeacher
from distill.tracking import read_metrics
from tests.distill import tiny
from tests.distill.tiny import VOCAB, run_until_killed, save_target, training

EOS = 2


@dataclass(frozen=True)
class Numbers(tiny.Numbers):
    """Small ids are more frequent."""

    def ids(self, number):
        draw = random.Random(f"{self.seed} {number}")
        return [3 + int((VOCAB - 3) * draw.random() ** 2) for _ in range(6)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def train(target, tmp_path):
    numbers = Numbers(40, seed=1), Numbers(3, seed=2)
    return training(target, tmp_path / "run", *numbers, learning_rate=0.01)


PRUNED = PrunedLM(num_layers=2, hidden_size=24, intermediate_size=20, calibration_tokens=64)
TRIMMED = {"vocabulary": VocabularySettings(keep=10)}
KINDS = {
    "pruned": {"drafter": PRUNED},
    "trimmed": TRIMMED,
    "pruned and trimmed": {"drafter": PRUNED, **TRIMMED},
}
EACH = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def test_the_ids_that_are_learnt_most_often_are_kept():
    examples = [Example([9, 9, 9, 9, 5], [3, 3, 4]), Example([9], [3, 4, 6, 7])]
    counts = learnt_counts(examples)
    assert counts == Counter({3: 3, 4: 2, 6: 1, 7: 1})  # prompts are not learnt
    assert learnt_counts([Example([9, 9], [3], learn_prompt=True)]) == Counter({9: 1, 3: 1})
    assert frequent_ids(counts, 2, always=[]) == [3, 4]
    assert frequent_ids(counts, 3, always=[]) == [3, 4, 6]  # of ties the smaller
    assert frequent_ids(counts, 2, always=[2]) == [2, 3]  # the end is one of the two
    assert frequent_ids(counts, 3, always=[4]) == [3, 4, 6]
    assert frequent_ids(counts, 100, always=[2]) == [2, 3, 4, 6, 7]  # none that never comes
    with pytest.raises(ValueError, match="keep must be >= 1"):
        VocabularySettings(keep=0)


@EACH
def test_a_smaller_drafter_is_trained_and_drafts_in_a_new_process(train, target, changes, capsys):
    folder = replace(train, **changes).run()
    kept = json.loads((folder / "draftsmith.json").read_text())["kept"]
    assert in_words(kept) in capsys.readouterr().out
    model = load_lm(folder)
    if "drafter" in changes:
        assert kept["layers"] == [0, 2]
        assert kept["feed_forward_channels"]["kept"] == 20
        assert 24 / 32 < kept["hidden_channels"]["share"] < 1
        assert (model.config.hidden_size, model.config.intermediate_size) == (24, 20)
    if "vocabulary" in changes:
        assert (kept["vocabulary"]["kept"], kept["vocabulary"]["of"]) == (10, VOCAB)
        counts = learnt_counts(train.data.examples(None))
        ids = model.lm_head.ids.tolist()
        assert ids == frequent_ids(counts, 10, always=[EOS])
        share = sum(counts[token] for token in ids) / counts.total()
        assert kept["vocabulary"]["share"] == pytest.approx(share, abs=1e-4)

    script = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import load_drafter
target = Target(AutoModelForCausalLM.from_pretrained({str(target)!r}))
tokenizer = AutoTokenizer.from_pretrained({str(target)!r})
drafter = load_drafter({str(folder)!r}, target=target, draft=3, tokenizer=tokenizer)
request = Request(id="0", prompt=[3, 4, 5], sampling=SamplingParams(max_new_tokens=20))
(result,) = SpeculativeDecoder(target, drafter).generate([request])
print(*result.tokens)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ids = torch.tensor([[3, 4, 5]])
    own = AutoModelForCausalLM.from_pretrained(target).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, pad_token_id=0
    )
    assert list(map(int, done.stdout.split())) == own[0, 3:].tolist()


def test_a_killed_training_goes_on_to_the_same_bits(train, tmp_path):
    train = replace(train, **KINDS["pruned and trimmed"])
    whole = replace(train, output=tmp_path / "whole").run()
    run_until_killed(train, before_step=3)
    again = train.run()
    for name in ("model.safetensors", "draftsmith.json", "config.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("objective", [ForwardKL(), CrossEntropy(), LKLambda()], ids=repr)
def test_a_trimmed_head_learns(train, objective):
    settings = replace(train.trainer, steps=60, learning_rate=0.02, warmup_steps=0, log_every=5)
    settings = replace(settings, evaluate_every=60)
    replace(train, **TRIMMED, objective=objective, data=Numbers(8, 1), trainer=settings).run()
    losses = [
        line["loss"] for line in read_metrics(train.output / "metrics.jsonl") if "loss" in line
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_a_trimmed_head_learns_from_stored_rows(train, tmp_path):
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True, top_logprobs=4)
    generate = Generate(
        target=train.target, prompts=Numbers(12, seed=5), sampling=sampling, output=tmp_path / "g"
    )
    data = SeqKD(rows=generate.run())
    replace(train, **TRIMMED, data=data, teacher=StoredTeacher()).run()
    told = [line for line in read_metrics(train.output / "metrics.jsonl") if "loss" in line]
    assert all(0 < line["alpha_lower"] <= line["alpha_upper"] <= 1 for line in told)


@EACH
def test_it_is_exported_and_trained_on(train, target, tmp_path, changes):
    folder = replace(train, **changes).run()
    output = tmp_path / "exported"
    settings = TargetSettings(path=str(target))
    Export(checkpoint=train.output, target=settings, prompts=Numbers(4, 1), output=output).run()
    trained, exported = load_lm(folder).state_dict(), load_lm(output).state_dict()
    assert all(torch.equal(exported[name], weight) for name, weight in trained.items())
    card = (output / "README.md").read_text()
    assert "| kept |" in card
    is_trimmed = "vocabulary" in changes
    assert ("load_lm" in card, "vllm serve" in card) == (is_trimmed, not is_trimmed)
    if is_trimmed:
        assert "drafts 10 of them" in " ".join(card.split())
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(output)
    else:
        AutoModelForCausalLM.from_pretrained(output)

    further = replace(train, drafter=CheckpointLM(path=str(output)), output=tmp_path / "further")
    assert hasattr(load_lm(further.run()).lm_head, "ids") == is_trimmed
    if is_trimmed:
        with pytest.raises(UserError, match="only some ids already"):
            replace(further, **TRIMMED, output=tmp_path / "twice").run()


def test_what_cannot_be_made_smaller_is_refused_in_one_sentence(train):
    with pytest.raises(UserError, match="only a language model's can be trimmed"):
        replace(train, **TRIMMED, drafter=Medusa(num_heads=2)).run()
    with pytest.raises(UserError, match="intermediate_size=100: this LlamaForCausalLM has 48"):
        replace(train, drafter=PrunedLM(intermediate_size=100)).run()
