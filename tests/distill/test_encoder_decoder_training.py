"""Heads of encoder-decoder targets, from prompts to a drafter in a new process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from decode import SamplingParams
from decode.certificate import greedy_output
from decode.models import Blockwise, HeadsCheckpoint, Hydra, Medusa, ScratchLM
from distill import checkpoint as checkpoints
from distill.batches import SeqKD, Text
from distill.errors import UserError
from distill.evaluate import Evaluate
from distill.export import Export
from distill.generate import Generate
from distill.joint import JointSettings
from distill.lora import LoraSettings
from distill.objectives import AdaSPEC, CrossEntropy, EndToEndTV, ForwardKL
from distill.pipeline import Pipeline, Variant
from distill.prompts import DatasetPrompts
from distill.regimes import InTheLoop, MixedTokens
from distill.store import RowStore
from distill.target import TargetSettings
from distill.teachers.stored import StoredTeacher
from distill.tracking import read_metrics
from distill.train import Train
from tests.distill.tiny import TRAINER, bart, run_until_killed, save_target, t5

HEADS = {
    "blockwise": Blockwise(num_heads=3),
    "medusa": Medusa(num_heads=2),
    "hydra++": Hydra(num_heads=2, num_layers=2, prefix_attention=True),
}
MAKE = {"t5": t5, "bart": bart}


def write_prompts(path: Path, first: int, count: int) -> DatasetPrompts:
    """Sources of 3 to 9 words, with as many as reference."""
    lines = []
    for i in range(first, first + count):
        words = [f"t{3 + (i * 7 + j * j * (i % 5 + 1)) % 21}" for j in range(3 + i % 7)]
        lines.append({"prompt": " ".join(words), "reference": " ".join(reversed(words))})
    path.write_text("\n".join(map(json.dumps, lines)))
    return DatasetPrompts(path=str(path))


@pytest.fixture(scope="module", params=MAKE)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, rows that it wrote, and prompts."""
    root = tmp_path_factory.mktemp(request.param)
    save_target(root / "target", MAKE[request.param]())
    Generate(
        target=TargetSettings(path=str(root / "target")),
        prompts=write_prompts(root / "prompts.jsonl", 0, 30),
        sampling=SamplingParams(max_new_tokens=12, top_logprobs=4),
        output=root / "generated",
    ).run()
    write_prompts(root / "others.jsonl", 100, 4)
    return root


@pytest.fixture
def train(root: Path, tmp_path: Path) -> Train:
    return Train(
        target=TargetSettings(path=str(root / "target")),
        drafter=HEADS["blockwise"],
        objective=ForwardKL(),
        data=SeqKD(rows=root / "generated" / "rows"),
        trainer=replace(TRAINER, learning_rate=0.01, warmup_steps=0),
        prompts=DatasetPrompts(path=str(root / "others.jsonl")),
        num_held_out=4,
        sampling=SamplingParams(max_new_tokens=12),
        draft_length=2,
        output=tmp_path / "run",
    )


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


def test_heads_are_trained_exported_and_draft_in_a_new_process(train, root, tmp_path):
    folder = train.run()
    taus = [line["heldout_tau"] for line in read_metrics(train.output / "metrics.jsonl")
            if "heldout_tau" in line]  # fmt: skip
    measured = json.loads((folder / "draftsmith.json").read_text())["measured"]
    assert measured["tau"] == max(taus)
    exported = Export(checkpoint=train.output, target=train.target, output=tmp_path / "out").run()
    script = f"""
import json
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import load_drafter
model = AutoModelForSeq2SeqLM.from_pretrained({str(root / "target")!r})
target = Target(model, max_batch_size=1, max_length=40)
tokenizer = AutoTokenizer.from_pretrained({str(root / "target")!r})
outputs = []
for folder in {[str(folder), str(exported)]!r}:
    drafter = load_drafter(folder, target=target, draft=2, tokenizer=tokenizer)
    requests = [
        Request(id=str(n), source=[3 + n, 4, 9], sampling=SamplingParams(max_new_tokens=20))
        for n in range(3)
    ]
    outputs += [r.tokens for r in SpeculativeDecoder(target, drafter).generate(requests)]
print(json.dumps(outputs))
"""
    there = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    model = AutoModelForSeq2SeqLM.from_pretrained(root / "target", dtype=torch.float32)
    own = [greedy_output(model, [3 + n, 4, 9], 20) for n in range(3)]
    assert json.loads(there) == own + own


def test_an_evaluation_of_heads_certifies(train, tmp_path):
    folder = replace(train, drafter=HEADS["hydra++"]).run()
    Evaluate(
        target=train.target,
        drafters={"heads": str(folder)},
        prompts=train.prompts,
        sampling=train.sampling,
        draft_length=3,
        batch_size=2,
        certify=True,
        num_resamples=100,
        output=tmp_path / "report",
    ).run()
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["drafters"]["heads"]["mismatches"] == 0
    certificate = json.loads((tmp_path / "report" / "certificate.json").read_text())
    assert certificate["heads"]["mismatches"] == []


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        (Blockwise(num_heads=3, one_at_a_time=True), CrossEntropy()),
        (HEADS["blockwise"], ForwardKL()),
        (HEADS["medusa"], EndToEndTV()),
    ],
    ids=str,
)
def test_heads_learn_what_follows(train, settings, objective):
    """On few rows, learnt by heart."""
    rate = replace(TRAINER, learning_rate=0.01, warmup_steps=0, steps=60, log_every=10)
    rate = replace(rate, evaluate_every=60, checkpoint_every=60)
    replace(train, drafter=settings, objective=objective, trainer=rate).run()
    found = losses(train.output)
    assert found[-1] < 0.8 * found[0]
    taus = [line["heldout_tau"] for line in read_metrics(train.output / "metrics.jsonl")
            if "heldout_tau" in line]  # fmt: skip
    assert len(taus) == 2


def test_the_rows_top_tokens_teach_as_the_target_does(train, tmp_path):
    """Four of 24 tokens and the tail are less than all, and nearly the same."""
    steps = replace(train.trainer, steps=2, log_every=1)
    live = replace(train, trainer=steps, output=tmp_path / "live")
    stored = replace(live, teacher=StoredTeacher(), output=tmp_path / "stored")
    live.run()
    stored.run()
    ours, theirs = losses(stored.output)[0], losses(live.output)[0]
    assert 0 < ours <= theirs * (1 + 1e-4)


def test_the_datas_own_outputs_stand_behind_the_decoders_beginning(train, root):
    prompts = DatasetPrompts(path=str(root / "prompts.jsonl"), reference_column="reference")
    train = replace(train, data=Text(prompts=prompts, max_new_tokens=12))
    target = train.target.load(may_have_encoder=True)
    _, (pool,) = train._split(target)
    words = json.loads((root / "prompts.jsonl").read_text().splitlines()[0])
    (example,) = (
        e for e in pool.examples if e.encoder_ids == target.tokenizer(words["prompt"])["input_ids"]
    )
    begins = target.model.generation_config
    forced = [] if begins.forced_bos_token_id is None else [begins.forced_bos_token_id]
    assert example.prompt_ids == [begins.decoder_start_token_id, *forced]
    assert example.output_ids == [*target.tokenizer(words["reference"])["input_ids"], 2]
    train.run()


def test_prompts_that_are_held_out_leave_the_rows(train, root):
    target = train.target.load(may_have_encoder=True)
    own = replace(train, prompts=DatasetPrompts(path=str(root / "prompts.jsonl")))
    held_out, (pool,) = own._split(target)
    withheld = {tuple(prompt.ids) for prompt in held_out}
    assert len(withheld) == 4
    assert not withheld & {tuple(example.encoder_ids) for example in pool.examples}
    assert len(pool.examples) == len(RowStore(train.data.rows)) - 4


@pytest.mark.parametrize(
    ("name", "in_the_loop"), [("blockwise", False), ("blockwise", True), ("hydra++", False)]
)
def test_a_killed_training_goes_on_to_the_same_bits(train, tmp_path, name, in_the_loop):
    if in_the_loop:
        train = replace(train, data=InTheLoop(source=train.data, every=2, num_prompts=6))
    train = replace(train, drafter=HEADS[name])
    whole = replace(train, output=tmp_path / "whole").run()
    run_until_killed(train, before_step=3)
    again = train.run()
    final = [checkpoints.latest(run / "checkpoints").path for run in (again.parent, whole.parent)]
    ours, theirs = ((path / "model.safetensors").read_bytes() for path in final)
    assert ours == theirs


def test_outputs_are_written_anew_beside_their_sources(train):
    """Greedy outputs decoded with the heads are those of the rows."""
    target = train.target.load(may_have_encoder=True)
    _, (pool,) = train._split(target)
    heads = HEADS["blockwise"].build(target.model)
    for regime in (InTheLoop(source=train.data), MixedTokens(source=train.data, top=1)):
        greedy = replace(regime, num_prompts=30, sampling=train.sampling)
        written = greedy.write(pool.examples, heads, target, max_length=14, seed=0, name="0")
        known = {tuple(e.encoder_ids): (e.prompt_ids, e.output_ids) for e in pool.examples}
        assert len(written) == len(known)
        for example in written:
            assert (example.prompt_ids, example.output_ids) == known[tuple(example.encoder_ids)]


def test_heads_and_target_are_trained_together(train, root, tmp_path):
    stage = replace(train, output=tmp_path / "first").run()
    train = replace(
        train,
        drafter=HeadsCheckpoint(path=str(stage)),
        lora=LoraSettings(rank=2),
        objective=CrossEntropy(),
        joint=JointSettings(warmup_steps=2),
        trainer=replace(train.trainer, learning_rate=0.02, log_every=1),
    )
    folder = train.run()
    lines = read_metrics(train.output / "metrics.jsonl")
    assert lines[0]["heldout_target_kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["heldout_target_agreement"] == 1
    assert all(line["target_kl"] > 0 for line in lines if "target_kl" in line and line["step"] > 2)
    assert lines[-1]["heldout_target_kl"] > 0
    own = TargetSettings(path=str(folder / "target"))
    Evaluate(
        target=own,
        drafters={"joint": str(folder)},
        prompts=train.prompts,
        sampling=train.sampling,
        draft_length=2,
        certify=True,
        num_resamples=100,
        output=tmp_path / "report",
    ).run()
    certificate = json.loads((tmp_path / "report" / "certificate.json").read_text())
    assert certificate["joint"]["mismatches"] == []


def test_adaspec_compares_heads_that_see_the_sources(train, tmp_path):
    reference = train.run()
    for fraction in (1.0, 0.4):
        objective = AdaSPEC(reference=str(reference), fraction=fraction)
        replace(train, objective=objective, output=tmp_path / str(fraction)).run()
    everything = losses(train.output)
    assert losses(tmp_path / "1.0") == pytest.approx(everything)
    assert losses(tmp_path / "0.4") != pytest.approx(everything)


def test_what_is_not_there_is_refused_in_a_sentence(train, root, tmp_path):
    scratch = replace(train, drafter=ScratchLM(num_layers=1, hidden_size=32))
    with pytest.raises(UserError, match="for which no drafters but heads are trained"):
        scratch.run()
    variants = {"own": Variant(data=SeqKD(), objective=CrossEntropy())}
    pipeline = Pipeline(
        target=train.target,
        drafter=scratch.drafter,
        variants=variants,
        trainer=train.trainer,
        output=tmp_path / "pipeline",
    )
    with pytest.raises(UserError, match="for which no drafters but heads are trained"):
        pipeline.run()
    assert not (tmp_path / "pipeline").exists()
    with pytest.raises(UserError, match="reads prompts and never writes them"):
        replace(train, data=replace(train.data, learn_prompt=True)).run()
    llama = save_target(tmp_path / "llama")
    with pytest.raises(UserError, match="which would not see the sources"):
        replace(train, objective=AdaSPEC(reference=str(llama))).run()
    with pytest.raises(UserError, match="LlamaForCausalLM has no encoder"):
        replace(train, target=TargetSettings(path=str(llama))).run()
    assert not train.output.exists()
