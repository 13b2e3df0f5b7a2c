"""Data that are written while training: what is written, by whom, and that a resumed run reads it.

Run as a script it is one training on as many processes as torchrun starts.
"""

import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from decode import Draft, Request, SamplingBatch, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import Chains
from decode.models import Medusa
from distill import checkpoint as checkpoints
from distill.batches import Example, SeqKD, collate
from distill.errors import UserError
from distill.fresh import read_examples
from distill.loop import Trainer
from distill.objectives import CrossEntropy, EndToEndTV
from distill.regimes import (
    DraftedWhereLikely,
    InTheLoop,
    MixedTokens,
    Mixture,
    OnPolicy,
    rejected_places,
    with_rows,
)
from distill.store import Row, RowStore
from distill.target import TargetSettings
from distill.teachers.stored import StoredTeacher
from distill.tracking import read_metrics
from tests.distill import tiny
from tests.distill.tiny import VOCAB, llama, run_until_killed, save_target, training

SHORT = SamplingParams(temperature=1.0, max_new_tokens=6, ignore_eos=True)


@dataclass(frozen=True)
class Numbers(tiny.Numbers):
    """The outputs are all the id 3."""

    def ids(self, number):
        draw = random.Random(f"{self.seed} {number}")
        return [draw.randrange(4, VOCAB) for _ in range(5)]

    def examples(self, tokenizer):
        return [Example(self.ids(number), [3] * 6) for number in range(self.count)]


def language_model(seed, layers=2):
    return llama(seed, num_layers=layers, spread=0.4)


def write_target(folder):
    return save_target(folder, language_model(0))


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


def make_train(target, output, data=None):
    settings = {"every": 3, "num_prompts": 10, "sampling": SHORT, "batch_size": 4}
    return training(
        target,
        output,
        data or OnPolicy(source=Numbers(40, seed=1), **settings),
        Numbers(3, seed=2),
        steps=8,
        micro_batch_size=1,
        learning_rate=0.02,
        warmup_steps=0,
        log_every=1,
        evaluate_every=4,
    )


def regime(kind, share=0.5, **others):
    source = Numbers(40, seed=1)
    settings = {"every": 3, "num_prompts": 10, "sampling": SHORT, "batch_size": 4}
    return kind(source=source, share=share, **(settings | others))


def written(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "written").iterdir())}


def pair(target, drafter=None):
    """What a regime writes with, and on."""
    loaded = TargetSettings(path=str(target)).load()
    return SimpleNamespace(drafter=drafter or language_model(7, layers=1), target=loaded)


def write(data, drafter, loaded, name="0:0", seed=0):
    examples = Numbers(40, seed=1).examples(None)
    return data.write(examples, drafter, loaded, max_length=24, seed=seed, name=name)


def mean_logprob(model, examples):
    """Of the output tokens behind the first, whoever wrote that."""
    total = count = 0
    for example in examples:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        begin = len(example.prompt_ids) + 1
        for place in range(begin, len(example.ids)):
            total += float(logits[place - 1, example.ids[place]])
            count += 1
    return total / count


def test_on_policy_outputs_are_the_drafters(target):
    """They are as likely under it as its own entropy says, and unlikely under the target."""
    two = pair(target)
    data = regime(OnPolicy, num_prompts=40)
    examples = write(data, two.drafter, two.target)
    prompts = {tuple(example.prompt_ids) for example in Numbers(40, 1).examples(None)}
    assert {tuple(example.prompt_ids) for example in examples} == prompts
    assert {len(example.output_ids) for example in examples} == {6}
    own = []
    for example in examples:
        with torch.inference_mode():
            law = two.drafter(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        own += (law.exp() * law).sum(-1)[len(example.prompt_ids) : -1].tolist()
    drafters = mean_logprob(two.drafter, examples)
    assert drafters == pytest.approx(sum(own) / len(own), abs=0.3)  # -entropy; 200 draws
    assert drafters > mean_logprob(two.target.model, examples) + 1
    greedy = replace(data, sampling=replace(SHORT, temperature=0.0))
    for example in write(greedy, two.drafter, two.target):
        ids = torch.tensor([example.prompt_ids])
        theirs = two.drafter.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
            pad_token_id=0, eos_token_id=-1,
        )  # fmt: skip
        assert theirs[0].tolist() == example.ids


def test_what_is_written_hangs_on_seed_and_name_but_not_on_the_batch(target):
    two = pair(target)
    for kind in (OnPolicy, MixedTokens, InTheLoop):
        data = regime(kind)
        first = write(data, two.drafter, two.target)
        assert write(replace(data, batch_size=1), two.drafter, two.target) == first
        assert write(data, two.drafter, two.target, name="0:3") != first
        assert write(data, two.drafter, two.target, seed=1) != first


def test_mixed_tokens_are_the_drafters_where_the_target_finds_them_likely(target):
    two = pair(target)
    for top in (1, 3):  # the target's samples lie among its likeliest too
        data = regime(MixedTokens, top=top, sampling=replace(SHORT, top_k=top))
        for example in write(data, two.drafter, two.target):
            with torch.inference_mode():
                logits = two.target.model(input_ids=torch.tensor([example.ids])).logits[0]
            best = logits.topk(top).indices.tolist()
            begin = len(example.prompt_ids)
            assert all(i in best[n - 1] for n, i in enumerate(example.ids) if n >= begin)
    # Where every token is likely, all but the first and the last are the drafter's own.
    free = write(regime(MixedTokens, top=VOCAB, num_prompts=40), two.drafter, two.target)
    free = [replace(example, output_ids=example.output_ids[:-1]) for example in free]
    alone = write(regime(OnPolicy, num_prompts=40), two.drafter, two.target)
    expected = mean_logprob(two.drafter, alone)
    assert mean_logprob(two.drafter, free) == pytest.approx(expected, abs=0.4)
    greedy = replace(SHORT, temperature=0.0)
    lengths = [
        write(regime(MixedTokens, top=3, draft_length=n, sampling=greedy), two.drafter, two.target)
        for n in (1, 2, 5)
    ]
    assert lengths[0] == lengths[1] == lengths[2]


def test_a_token_has_the_law_of_speculative_kd():
    """The drafter's q where the target finds it likely, and p for the mass of q elsewhere."""
    count, top = 4000, 2
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.rand(2, 6, generator=draw) * 3).softmax(-1)
    likely = torch.zeros(6).scatter(0, p.topk(top).indices, 1.0)
    expected = q * likely + (q * (1 - likely)).sum() * p
    drafted = q.multinomial(count, replacement=True, generator=draw)[:, None]
    draft = Draft.chain(torch.cat([torch.zeros_like(drafted), drafted], 1))
    generators = [torch.Generator().manual_seed(n) for n in range(count)]
    sampling = SamplingBatch.of([SamplingParams(temperature=1.0)] * count, generators)
    logits = p.log().expand(count, 2, 6)
    found = DraftedWhereLikely(top).accept(draft, logits, sampling)
    assert not any(found.num_accepted)  # one token each, from whomever
    shares = torch.tensor(found.next_tokens).bincount(minlength=6) / count
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.025)


def test_a_whole_draft_ends_with_its_own_token_and_a_broken_one_with_the_targets():
    logits = torch.zeros(2, 3, 8)
    logits[:, :, :2] = torch.tensor([6.0, 5.0])  # 0 and 1 are the two likeliest everywhere
    greedy = SamplingBatch.of([SamplingParams()] * 2, [torch.Generator(), torch.Generator()])
    draft = Draft.chain(torch.tensor([[7, 1, 0], [7, 1, 5]]))
    found = DraftedWhereLikely(2).accept(draft, logits, greedy)
    assert found.paths == [[0, 1], [0, 1]]
    assert found.next_tokens == [0, 0]  # the draft's last, and the target's likeliest
    draft = Draft.chain(torch.tensor([[7, 1, 1], [7, 5, 1]]))
    found = DraftedWhereLikely(2).accept(draft, logits, greedy)
    assert (found.num_accepted, found.next_tokens) == ([1, 0], [1, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rejected_places_are_those_that_the_decoder_rejected(target, temperature):
    two = pair(target)
    runtime = Target(two.target.model, max_batch_size=4)
    records = []
    decoder = SpeculativeDecoder(
        runtime, Chains(length=3).build(two.drafter, runtime), on_step=records.append
    )
    sampling = SamplingParams(temperature=temperature, max_new_tokens=12)
    requests = [
        Request(id=str(n), prompt=Numbers(12, 1).ids(n), sampling=sampling) for n in range(12)
    ]
    for result in decoder.generate(requests):
        wrong = []
        for record in (r for r in records if r.request_id == result.request_id):
            stopped = len(record.path) == len(record.emitted)  # an end inside the accepted path
            if len(record.path) < len(record.tokens) - 1 and not stopped:
                wrong.append(record.length - 5 + len(record.path))
                assert result.tokens[wrong[-1]] == record.emitted[-1]
        assert rejected_places(result) == wrong
        if temperature == 0:  # and by the drafter itself, without the decoder
            for place in wrong:
                before = torch.tensor([Numbers(12, 1).ids(int(result.request_id))
                                       + result.tokens[:place]])  # fmt: skip
                with torch.inference_mode():
                    drafted = two.drafter(input_ids=before).logits[0, -1].argmax()
                assert drafted != result.tokens[place]
    assert any(len(record.path) < len(record.tokens) - 1 for record in records)


def test_rejected_tokens_weigh_more_and_all_of_them_1_on_average(target):
    two = pair(target)
    greedy = replace(SHORT, temperature=0.0)
    examples = write(regime(InTheLoop, rejected=5.0, sampling=greedy), two.drafter, two.target)
    weights = [weight for example in examples for weight in example.weights]
    low, high = sorted(set(weights))
    assert high == pytest.approx(5 * low)
    assert sum(weights) == pytest.approx(len(weights))
    model = two.target.model
    for example in examples:  # the target's greedy outputs, as in Seq-KD rows
        ids = torch.tensor([example.prompt_ids])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
            pad_token_id=0, eos_token_id=-1,
        )  # fmt: skip
        assert theirs[0].tolist() == example.ids
    only = write(regime(InTheLoop, elsewhere=0.0, sampling=greedy), two.drafter, two.target)
    assert [[w > 0 for w in e.weights] for e in only] == [
        [w == high for w in e.weights] for e in examples
    ]
    agreed = write(regime(InTheLoop, elsewhere=0.0, sampling=greedy), model, two.target)
    assert {weight for example in agreed for weight in example.weights} == {0.0}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(MixedTokens, "top"), (MixedTokens, "draft_length"), (InTheLoop, "draft_length")],
)
def test_counts_below_one_are_refused(kind, name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        regime(kind, **{name: 0})


def test_a_mixture_has_its_shares():
    one, other = Numbers(40, seed=1), Numbers(10, seed=2)
    inner = regime(OnPolicy, share=0.25)
    data = Mixture(parts={"a": one, "b": other, "c": inner}, weights={"a": 1.0, "b": 2.0, "c": 1.0})
    pools = data.pools(None)
    assert [pool.share for pool in pools] == [0.25, 0.5, 0.1875, 0.0625]
    assert [pool.writer for pool in pools] == [None, None, None, inner]
    with pytest.raises(ValueError, match=r"every part needs a weight .* see 'b'"):
        Mixture(parts={"a": one, "b": other}, weights={"a": 1.0})
    with pytest.raises(ValueError, match="not all 0"):
        Mixture(parts={"a": one}, weights={"a": 0.0})
    with pytest.raises(UserError, match="is itself written while training"):
        OnPolicy(source=inner).pools(None)


def stored(folder, k):
    """Rows of the outputs 3 4, with the k likeliest tokens; halves: 1/2, 1/4, ..."""
    ids, logprobs = list(range(k)), [math.log(0.5 ** (n + 1)) for n in range(k)]
    top = {"top_ids": [ids] * 2, "top_logprobs": [logprobs] * 2, "tail_mass": [0.5**k] * 2}
    RowStore(folder).append([Row("key", "p", "s", [1, 2], [3, 4], "eos", **(top if k else {}))])
    return SeqKD(rows=folder)


def test_stores_with_more_tokens_join_those_with_fewer_or_none(tmp_path):
    parts = {f"of_{k}": stored(tmp_path / str(k), k) for k in (4, 2, 0)}
    for names in (["of_4", "of_2"], ["of_4", "of_2", "of_0"]):
        data = Mixture(
            parts={name: parts[name] for name in names}, weights=dict.fromkeys(names, 1.0)
        )
        examples = [example for pool in data.pools(None) for example in pool.examples]
        batch = collate([[example] for example in examples], 6)
        if "of_0" in names:
            assert batch.top is None  # there is nothing to read, and a live target is not hindered
            continue
        assert batch.top.ids.tolist() == [[0, 1]] * 4
        torch.testing.assert_close(batch.top.tail_mass, torch.full((4,), 0.25))


def test_batches_hold_their_share_of_fresh_outputs(target, tmp_path, monkeypatch):
    """The source's outputs are all the id 3, which the drafter seldom writes six times."""
    data = regime(OnPolicy, share=0.25, num_prompts=10)
    train = make_train(target, tmp_path / "run", data)
    seen = {}
    step = Trainer._train_step

    def watched(trainer):
        packs = trainer.stream.for_process(trainer.step, 0, 1, 1)
        seen[trainer.step] = [batch.input_ids[batch.loss_mask].view(-1, 6) for batch in packs]
        step(trainer)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    train.run()
    outputs = torch.cat([outputs for packs in seen.values() for outputs in packs])
    assert (outputs != 3).any(-1).double().mean() == pytest.approx(0.25, abs=0.08)
    for begin in (0, 3, 6):
        path = train.output / "written" / f"pool-1-step-{begin:08}.jsonl"
        fresh = {tuple(example.output_ids) for example in read_examples(path)}
        period = [seen[step] for step in range(begin, min(begin + 3, 8))]
        found = {tuple(o) for packs in period for each in packs for o in each.tolist()}
        assert found - {(3,) * 6} <= fresh
        assert found & fresh


HEADS = Medusa(num_heads=2)
KILLED = [(kind, None, at) for kind in (OnPolicy, MixedTokens, InTheLoop) for at in (1, 3, 5, 7)]
KILLED += [(kind, HEADS, at) for kind in (MixedTokens, InTheLoop) for at in (5, 7)]


@pytest.mark.parametrize(
    ("kind", "drafter", "at"), KILLED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_a_killed_run_goes_on_to_the_same_bits(target, tmp_path, kind, drafter, at):
    data = Mixture(
        parts={"fresh": regime(kind), "other": regime(InTheLoop, every=4)},
        weights={"fresh": 0.7, "other": 0.3},
    )
    whole = make_train(target, tmp_path / "whole", data)
    whole = replace(whole, drafter=drafter or whole.drafter)
    whole.run()
    train = replace(whole, output=tmp_path / "run")
    run_until_killed(train, before_step=at)
    train.run()
    assert written(train.output) == written(whole.output)
    assert len(written(train.output)) == 3 + 2
    final = [checkpoints.latest(run.output / "checkpoints").path for run in (train, whole)]
    assert final[0].name == "step-00000008"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (final[0] / name).read_bytes() == (final[1] / name).read_bytes()


def test_a_run_whose_data_are_gone_is_refused(target, tmp_path):
    train = make_train(target, tmp_path / "run")
    run_until_killed(train, before_step=5)
    (train.output / "written" / "pool-1-step-00000003.jsonl").unlink()
    with pytest.raises(UserError, match="what was written while training cannot be read"):
        train.run()


def test_two_processes_see_the_data_of_one(target, tmp_path):
    one = make_train(target, tmp_path / "one")
    one.run()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(target), str(tmp_path / "two")]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first = "pool-1-step-00000000.jsonl"
    assert written(tmp_path / "two").keys() == written(one.output).keys()
    assert written(tmp_path / "two")[first] == written(one.output)[first]
    ours, theirs = (
        [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line][:3]
        for folder in (tmp_path / "two", one.output)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4)
        assert our["tokens"] == their["tokens"]


def test_what_cannot_be_learnt_is_refused_before_training(target, tmp_path):
    train = make_train(target, tmp_path / "run")
    with pytest.raises(UserError, match=r"nothing is stored about outputs .* teacher=live"):
        replace(train, teacher=StoredTeacher()).run()
    with pytest.raises(UserError, match=r"heads cannot write .* data=mixed_tokens"):
        replace(train, drafter=Medusa(num_heads=2)).run()
    for kind in (OnPolicy, MixedTokens):
        with pytest.raises(UserError, match="CrossEntropy would learn these"):
            replace(train, data=regime(kind), objective=CrossEntropy()).run()
    with pytest.raises(UserError, match="end_to_end_tv judges whole drafts"):
        replace(train, data=regime(InTheLoop, elsewhere=0.0), objective=EndToEndTV()).run()
    assert not (tmp_path / "run").exists()
    replace(
        train, data=regime(InTheLoop), objective=CrossEntropy(), teacher=StoredTeacher()
    ).run()  # learns the target's tokens: asks it nothing


def test_a_pipelines_rows_go_wherever_rows_are_missing(tmp_path):
    none, named = SeqKD(), SeqKD(rows=tmp_path / "mine")
    data = Mixture(
        parts={"a": OnPolicy(source=none), "b": named, "c": none},
        weights={"a": 1.0, "b": 1.0, "c": 1.0},
    )
    rows = tmp_path / "rows"
    found = with_rows(data, rows)
    assert found.parts == {
        "a": OnPolicy(source=SeqKD(rows=rows)), "b": named, "c": SeqKD(rows=rows),
    }  # fmt: skip
    assert with_rows(Numbers(1, 0), rows) == Numbers(1, 0)


def test_settings_that_write_nothing_are_refused():
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        regime(OnPolicy, share=0)
    with pytest.raises(ValueError, match="every must be >= 1"):
        regime(MixedTokens, every=0)
    with pytest.raises(ValueError, match="elsewhere >= 0"):
        regime(InTheLoop, elsewhere=-1.0)


if __name__ == "__main__":
    make_train(Path(sys.argv[1]), Path(sys.argv[2])).run()
