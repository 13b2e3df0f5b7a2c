"""The train command as a Python object: a drafter's folder from settings."""

import json
import random
from dataclasses import dataclass, replace
from itertools import permutations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from decode import Request, SpeculativeDecoder, Target
from decode.drafters import load_drafter
from decode.models import (
    Blockwise,
    CheckpointLM,
    HeadsCheckpoint,
    Hydra,
    Medusa,
    ScratchLM,
    TargetLayersLM,
    load_heads,
)
from distill import checkpoint as checkpoints
from distill.alignment import lm as alignment
from distill.batches import SeqKD
from distill.depth_weights import Decay, Survival, Uniform
from distill.drafter_folder import check_target
from distill.errors import UserError
from distill.generate import Generate
from distill.joint import JointSettings
from distill.objectives import (
    AdaSPEC,
    CrossEntropy,
    EndToEndTV,
    ForwardKL,
    GreedyAcceptance,
    LKLambda,
)
from distill.shrinking import VocabularySettings
from distill.target import TargetSettings
from distill.teachers.stored import StoredTeacher
from distill.tracking import read_metrics
from distill.train import LoraSettings, SamplingParams
from tests.distill import tiny
from tests.distill.tiny import VOCAB, run_until_killed, save_target, training


@dataclass(frozen=True)
class Numbers(tiny.Numbers):
    """The first `overlap` of both are the same."""

    overlap: int = 0

    def ids(self, number):
        if number >= self.overlap:
            return super().ids(number)
        draw = random.Random(number)
        return [draw.randrange(3, VOCAB) for _ in range(6)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def train(target, tmp_path):
    return training(target, tmp_path / "run", Numbers(40, seed=1), Numbers(3, seed=2))


def test_a_run_leaves_a_drafter_that_the_decoder_loads(train, target, capsys):
    folder = train.run()
    description = json.loads((folder / "draftsmith.json").read_text())
    assert description["family"] == "lm"
    assert description["best_step"] in {0, 2, 4}
    taus = {
        line["step"]: line["heldout_tau"]
        for line in read_metrics(train.output / "metrics.jsonl")
        if "heldout_tau" in line
    }
    assert taus.keys() == {0, 2, 4}
    assert description["measured"]["tau"] == max(taus.values()) == taus[description["best_step"]]
    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    load_drafter(folder, target=Target(model), draft=2, tokenizer=tokenizer)

    before = (folder / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train.run()
    assert "is finished" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_are_refused_and_indifferent_ones_are_not(train):
    train.run()
    with pytest.raises(UserError, match=r"other settings \(objective.temperature differ\)"):
        replace(train, objective=ForwardKL(temperature=2.0)).run()
    with pytest.raises(UserError, match="data_hash"):
        replace(train, data=Numbers(41, seed=1)).run()
    replace(train, trainer=replace(train.trainer, micro_batch_size=1, keep_checkpoints=5)).run()


def test_a_run_cut_off_before_the_drafter_was_written_goes_on(train, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(UserError, match="No space left"):
            train.run()
    assert not (train.output / "drafter").exists()
    assert train.run().is_dir()
    assert checkpoints.latest(train.output / "checkpoints").step == 4


def test_lora_is_merged_into_a_plain_model(train, target):
    settings = replace(train.trainer, learning_rate=0.1, warmup_steps=0)
    folder = replace(
        train,
        drafter=CheckpointLM(path=str(target)),
        lora=LoraSettings(rank=2),
        objective=CrossEntropy(),
        trainer=settings,
    ).run()
    first, last = (checkpoints.checkpoints(train.output / "checkpoints")[i] for i in (0, -1))
    assert all("lora_" in name for name in load_names(first.path))
    assert last.step == 4
    drafter = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(target)
    assert drafter.state_dict().keys() == original.state_dict().keys()
    if json.loads((folder / "draftsmith.json").read_text())["best_step"]:
        changed = drafter.model.layers[0].mlp.up_proj.weight
        assert not torch.equal(changed, original.model.layers[0].mlp.up_proj.weight)


def load_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_target_as_its_own_drafter_accepts_everything(train):
    settings = replace(train.trainer, steps=1, learning_rate=1e-9)
    folder = replace(train, drafter=TargetLayersLM(num_layers=3), trainer=settings).run()
    measured = json.loads((folder / "draftsmith.json").read_text())["measured"]
    assert measured["alpha"] == 1.0
    assert measured["tau"] > 2  # of 3; drafts are cut where the output ends


def test_held_out_prompts_are_never_trained_on(train):
    target = train.target.load()
    train = replace(train, num_held_out=3, data=Numbers(8, seed=1, overlap=4))
    held_out, (pool,) = replace(train, prompts=Numbers(10, seed=2, overlap=4))._split(target)
    assert [prompt.id for prompt in held_out] == ["4", "5", "6"]  # 0 to 3 are in the data
    assert len(pool.examples) == 8
    held_out, (pool,) = replace(train, prompts=Numbers(4, seed=2, overlap=4))._split(target)
    assert [prompt.id for prompt in held_out] == ["0", "1", "2"]
    assert len(pool.examples) == 5  # so these leave the data
    with pytest.raises(UserError, match="all 2 examples are on the 3 held-out prompts"):
        replace(train, data=Numbers(2, 1, 4), prompts=Numbers(3, 2, 4))._split(target)


def test_what_does_not_fit_is_refused_in_one_sentence(train, target, tmp_path):
    long = replace(train.trainer, sequence_length=64)
    with pytest.raises(UserError, match=r"sequence_length=64 is longer than the context .* 48"):
        replace(train, trainer=long).run()
    with pytest.raises(UserError, match="the target has 3 layers"):
        replace(train, drafter=TargetLayersLM(num_layers=4)).run()
    with pytest.raises(UserError, match="choose another drafter"):
        replace(train, drafter=CheckpointLM(path=str(tmp_path / "nowhere"))).run()
    words = Tokenizer(WordLevel({"<unk>": 0, "other": 1}, unk_token="<unk>"))
    other = tmp_path / "other"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(other)
    with pytest.raises(UserError, match="tokenizer is not the target's"):
        replace(train, drafter=CheckpointLM(path=str(other))).run()


HEADS = {
    "medusa": Medusa(num_heads=3),
    "medusa, shared": Medusa(num_heads=3, share_head=True),
    "hydra": Hydra(num_heads=3, num_layers=2),
    "hydra++": Hydra(num_heads=3, num_layers=2, prefix_attention=True),
    "blockwise": Blockwise(num_heads=3),
    "blockwise, one at a time": Blockwise(num_heads=3, one_at_a_time=True),
}


@pytest.mark.parametrize("name", ["medusa", "hydra++", "blockwise"])
def test_every_weight_of_heads_is_trained_and_the_best_are_kept(train, target, name):
    settings = HEADS[name]
    rate = replace(train.trainer, learning_rate=0.01, warmup_steps=0, evaluate_every=4)
    folder = replace(train, drafter=settings, trainer=rate).run()
    description = json.loads((folder / "draftsmith.json").read_text())
    assert description["family"] == settings.family
    last = checkpoints.latest(train.output / "checkpoints")
    assert last.step == 4

    model = AutoModelForCausalLM.from_pretrained(target)
    untrained, trained = settings.build(model), settings.build(model)
    last.restore_model(trained)
    changed = [
        not torch.equal(a, b)
        for a, b in zip(untrained.parameters(), trained.parameters(), strict=True)
    ]
    assert all(changed)
    best = load_heads(folder, model).state_dict()
    if description["best_step"] == 4:
        assert all(torch.equal(best[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "objective", "depth_weights"),
    [
        (HEADS["medusa"], CrossEntropy(), Decay()),
        (HEADS["hydra++"], ForwardKL(), Survival()),
        (HEADS["medusa, shared"], EndToEndTV(), Uniform()),
        (HEADS["blockwise"], LKLambda(), Uniform()),
        (HEADS["blockwise, one at a time"], CrossEntropy(), Uniform()),
    ],
    ids=str,
)
def test_heads_learn_what_follows(train, settings, objective, depth_weights):
    """On a few rows, learnt by heart, every depth's loss falls."""
    rate = replace(
        train.trainer, learning_rate=0.02, warmup_steps=0, steps=60, evaluate_every=60, log_every=5
    )
    replace(
        train,
        drafter=settings,
        objective=objective,
        depth_weights=depth_weights,
        trainer=rate,
        data=Numbers(8, 1),
    ).run()
    losses = [
        line["loss"] for line in read_metrics(train.output / "metrics.jsonl") if "loss" in line
    ]
    assert losses[-1] < 0.8 * losses[0]


def stored_rows(train, folder, temperature=0.0):
    """Written by the target, with its four likeliest tokens at every place."""
    sampling = SamplingParams(
        temperature=temperature, max_new_tokens=8, ignore_eos=True, top_logprobs=4
    )
    prompts = Numbers(12, seed=5)
    return Generate(target=train.target, prompts=prompts, sampling=sampling, output=folder).run()


def with_a_reference(train, folder):
    """AdaSPEC that chooses anew in each of a step's micro-batches."""
    reference = replace(train, output=folder / "reference").run()
    trainer = replace(train.trainer, micro_batch_size=1)
    return replace(train, objective=AdaSPEC(reference=str(reference)), trainer=trainer)


def with_rows_for_a_teacher(train, folder):
    return replace(train, data=SeqKD(rows=stored_rows(train, folder)), teacher=StoredTeacher())


def with_adapters(train, folder):
    drafter, lora = CheckpointLM(path=train.target.path), LoraSettings(rank=2, dropout=0.2)
    return replace(train, drafter=drafter, lora=lora, objective=CrossEntropy())


def having(**settings):
    return lambda train, folder: replace(train, **settings)


RESUMED = {name: having(drafter=settings) for name, settings in HEADS.items()} | {
    "heads, weighed": having(drafter=HEADS["medusa"], depth_weights=Survival()),
    "whole drafts": having(objective=EndToEndTV(block=3)),
    "chosen tokens": with_a_reference,
    "stored teacher": with_rows_for_a_teacher,
    "adapters": with_adapters,
}


@pytest.mark.parametrize("prepare", RESUMED.values(), ids=RESUMED)
def test_a_killed_training_goes_on_to_the_same_bits(train, prepare, tmp_path):
    rate = replace(train.trainer, learning_rate=0.01)
    train = prepare(replace(train, trainer=rate), tmp_path / "before")
    whole = replace(train, output=tmp_path / "whole").run()
    run_until_killed(train, before_step=3)
    middle = checkpoints.latest(train.output / "checkpoints")
    assert middle.step == 2
    weights = (middle.path / "model.safetensors").read_bytes()
    again = train.run()
    for name in ("model.safetensors", "draftsmith.json", "config.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    final = [checkpoints.latest(run / "checkpoints").path for run in (train.output, whole.parent)]
    ours, theirs = ((path / "model.safetensors").read_bytes() for path in final)
    assert ours == theirs != weights


def test_the_target_runs_once_per_batch_of_heads(train, monkeypatch):
    calls = []
    forward = alignment.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(alignment, "forward", counted)
    replace(train, drafter=Medusa()).run()
    assert len(calls) == train.trainer.steps


def test_heads_read_the_target_whatever_the_objective(train):
    long = replace(train.trainer, sequence_length=64)
    with pytest.raises(UserError, match=r"longer than the context of LlamaForCausalLM, 48"):
        replace(train, drafter=Medusa(), objective=CrossEntropy(), trainer=long).run()


@pytest.mark.parametrize("first", [Medusa(num_heads=2), Blockwise(num_heads=2)], ids=str)
def test_heads_and_target_are_trained_together(train, target, tmp_path, first):
    """In two stages; the finished folder holds the target that the heads belong to. Killed and
    resumed, in the middle of the warm-up, it ends with the same bits."""
    stage = replace(train, drafter=first, output=tmp_path / "first").run()
    train = replace(
        train,
        drafter=HeadsCheckpoint(path=str(stage)),
        lora=LoraSettings(rank=2),
        objective=CrossEntropy(),
        joint=JointSettings(warmup_steps=4),
        trainer=replace(train.trainer, learning_rate=0.05, warmup_steps=0, log_every=1),
    )
    whole = replace(train, output=tmp_path / "whole").run()
    run_until_killed(train, before_step=3)
    folder = train.run()
    for name in ("model.safetensors", "target/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    last = [checkpoints.latest(run / "checkpoints").path for run in (train.output, whole.parent)]
    ours, theirs = ((path / "model.safetensors").read_bytes() for path in last)
    assert ours == theirs
    stored = load_names(last[0])
    assert any("lora_" in name for name in stored)
    assert all(name.startswith("heads.") or "lora_" in name for name in stored)
    lines = read_metrics(train.output / "metrics.jsonl")
    assert all(line["target_kl"] > 0 for line in lines if "target_kl" in line and line["step"] > 2)
    assert lines[0]["heldout_target_kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["heldout_target_agreement"] == 1
    # One token has one prediction per head, but behind the last tokens of an output of six.
    predictions = sum(max(6 - depth, 0) for depth in (1, 2)) / 6
    lines = [line for line in lines if "loss" in line]
    weights = [line["heads_weight"] for line in lines]
    assert weights == pytest.approx([0.05, 0.1, 0.15, 0.2])
    for line in lines:
        heads = line["heads_weight"] * line["heads_loss"] * predictions
        assert line["loss"] == pytest.approx(line["target_kl"] + heads, rel=1e-4)

    tuned = AutoModelForCausalLM.from_pretrained(folder / "target")
    settings = TargetSettings(path=str(folder / "target"))
    description = json.loads((folder / "draftsmith.json").read_text())
    check_target(description, folder, settings.load())
    assert description["trained_from"] == str(target)
    if description["best_step"]:
        with pytest.raises(UserError, match="aligned to the target"):
            check_target(description, folder, train.target.load())
    runtime = Target(tuned)
    drafter = load_drafter(folder, target=runtime, draft=2)
    sampling = SamplingParams(max_new_tokens=16)
    request = Request(id="0", prompt=[3, 4, 5], sampling=sampling)
    (result,) = SpeculativeDecoder(runtime, drafter).generate([request])
    ids = torch.tensor([[3, 4, 5]])
    own = tuned.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=16, pad_token_id=0)  # fmt: skip
    assert result.tokens == own[0, 3:].tolist()


@pytest.mark.parametrize(
    "objective", [LKLambda(), EndToEndTV(block=3), GreedyAcceptance(block=3), LKLambda(block=3)]
)
def test_objectives_of_acceptance_train(train, objective):
    weights = Uniform() if objective.block == 1 else Survival()
    folder = replace(train, objective=objective, depth_weights=weights).run()
    description = json.loads((folder / "draftsmith.json").read_text())
    assert description["objective"]["type"] == type(objective).__name__
    told = read_metrics(train.output / "metrics.jsonl")[-2].keys()
    assert told >= ({"alpha_3", "accepted_length"} if objective.block == 3 else {"alpha"})


def test_tokens_that_are_learnt_one_by_one_have_no_depths_to_weigh(train):
    with pytest.raises(UserError, match="learns its tokens one by one"):
        replace(train, depth_weights=Decay()).run()


def test_adaspec_reads_its_reference(train):
    reference = train.run()
    objective = AdaSPEC(reference=str(reference))
    replace(train, objective=objective, output=train.output.parent / "second").run()
    wrong = AdaSPEC(reference=str(train.output / "nothing"))
    with pytest.raises(UserError, match="there is no drafter here"):
        replace(train, objective=wrong, output=train.output.parent / "third").run()


def test_adaspecs_reference_covers_the_ids_of_the_drafter(train, tmp_path):
    """Losses over other ids are no excess of each other."""
    trimmed = replace(train, vocabulary=VocabularySettings(keep=12))
    for number, (reference, drafter) in enumerate(permutations((train, trimmed))):
        path = str(replace(reference, output=tmp_path / f"reference-{number}").run())
        run = replace(drafter, objective=AdaSPEC(reference=path), output=tmp_path / str(number))
        with pytest.raises(UserError, match="of the drafter and of its reference cover different"):
            run.run()
        replace(run, vocabulary=reference.vocabulary).run()


def test_adaspecs_reference_of_heads_must_have_what_is_compared(train, tmp_path):
    train = replace(train, drafter=Medusa(num_heads=2))
    train.run()
    again = replace(train, objective=AdaSPEC(reference=str(train.output)), output=tmp_path / "2")
    again.run()
    told = read_metrics(again.output / "metrics.jsonl")
    assert any("alpha_2" in line for line in told)
    for drafter, message in (
        (ScratchLM(num_layers=1, hidden_size=32), "a language model with another"),
        (Medusa(num_heads=3), "the drafter has 3 heads, adaspec's reference 2"),
        (Blockwise(num_heads=2, one_at_a_time=True), "only one is trained at a time"),
    ):
        with pytest.raises(UserError, match=message):
            replace(again, drafter=drafter, output=tmp_path / "3").run()


def changed(folder, model_settings, tokenizer_of):
    """A model of other weights and sizes in `folder`."""
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(tokenizer_of)
    config.update({"num_hidden_layers": 1} | model_settings)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def test_adaspecs_reference_must_fit_and_stay_the_same(train, target, tmp_path):
    objective = AdaSPEC(reference=str(tmp_path / "reference"))
    train = replace(train, objective=objective)
    for settings, message in (
        ({"max_position_embeddings": 16}, "longer than the context of LlamaForCausalLM, 16"),
        ({"vocab_size": VOCAB - 1}, r"has 23 ids, the target's tokenizer 24"),
    ):
        changed(tmp_path / "reference", settings, target)
        with pytest.raises(UserError, match=message):
            train.run()
    changed(tmp_path / "reference", {}, target)
    train.run()
    other = replace(train, trainer=replace(train.trainer, micro_batch_size=1))
    with pytest.raises(UserError, match=r"trainer.micro_batch_size differ"):
        other.run()  # tokens are chosen within a micro-batch
    changed(tmp_path / "reference", {"num_hidden_layers": 2}, target)
    with pytest.raises(UserError, match="reference_fingerprint differ"):
        train.run()


def test_one_head_at_a_time_keeps_to_its_batches_and_learns_no_whole_drafts(train):
    train = replace(train, drafter=HEADS["blockwise, one at a time"])
    with pytest.raises(UserError, match="by Decay, but only one is trained at a time"):
        replace(train, depth_weights=Decay()).run()
    with pytest.raises(UserError, match="judges whole drafts, but only one head"):
        replace(train, objective=EndToEndTV()).run()
    train.run()
    other = replace(train, trainer=replace(train.trainer, micro_batch_size=1))
    with pytest.raises(UserError, match=r"trainer.micro_batch_size differ"):
        other.run()  # the head is drawn for each micro-batch


def test_heads_go_on_with_their_own_target_only(train, target, tmp_path):
    replace(train, drafter=Medusa(num_heads=2)).run()
    train = replace(train, drafter=HeadsCheckpoint(path=str(train.output)))  # the whole run
    drafter, _ = train._drafter(train.target.load(), [])
    assert drafter.num_heads == 2
    changed(tmp_path / "other", {"num_hidden_layers": 3}, target)  # of the same sizes
    other = replace(train, target=TargetSettings(path=str(tmp_path / "other")))
    with pytest.raises(UserError, match="aligned to the target"):
        other.run()
    with pytest.raises(UserError, match="there is no drafter here"):
        replace(train, drafter=HeadsCheckpoint(path=str(tmp_path / "none"))).run()


def test_rows_with_a_stored_top_teach_without_the_target(train, tmp_path):
    data = SeqKD(rows=stored_rows(train, tmp_path / "g"))
    stored = replace(train, data=data, teacher=StoredTeacher())
    stored.run()
    told = [line for line in read_metrics(train.output / "metrics.jsonl") if "loss" in line]
    assert all(0 < line["alpha_lower"] <= line["alpha_upper"] <= 1 for line in told)
    replace(stored, drafter=Medusa(num_heads=2), output=tmp_path / "heads").run()
    told = [line for line in read_metrics(tmp_path / "heads/metrics.jsonl") if "loss" in line]
    assert all(0 < line["alpha_2_lower"] <= line["alpha_2_upper"] <= 1 for line in told)
    assert all("greedy_alpha_2_lower" in line for line in told)
    with pytest.raises(UserError, match=r"at temperature 1, not 0\.5"):
        replace(stored, objective=ForwardKL(temperature=0.5), output=tmp_path / "other").run()
    with pytest.raises(UserError, match="hold no top-k"):
        replace(train, teacher=StoredTeacher(), output=tmp_path / "none").run()


def test_what_is_stored_while_sampling_teaches_at_that_temperature(train, tmp_path):
    data = SeqKD(rows=stored_rows(train, tmp_path / "g", temperature=0.5))
    objective = ForwardKL(temperature=0.5)
    live = replace(train, data=data, objective=objective)
    stored = replace(live, teacher=StoredTeacher(), output=tmp_path / "stored")
    for each in (live, stored):
        each.run()
    told, bounds = (
        [line for line in read_metrics(each.output / "metrics.jsonl") if "loss" in line]
        for each in (live, stored)
    )
    first, within = told[0]["alpha"], bounds[0]
    assert within["alpha_lower"] < first < within["alpha_upper"]
    with pytest.raises(UserError, match=r"at temperature 0\.5, not 1"):
        replace(stored, objective=ForwardKL(), output=tmp_path / "other").run()
