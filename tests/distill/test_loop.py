"""The loop: it learns, and neither splits nor interruptions nor processes change the curve.

Run as a script it is one training on as many processes as torchrun starts.
"""

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from decode.models import ScratchLM
from distill import checkpoint as checkpoints
from distill.alignment.lm import LiveTarget, LMAlignment
from distill.batches import BatchStream, Example, Pool
from distill.errors import UserError
from distill.loop import Precision, Schedule, Trainee, Trainer, TrainerSettings, part
from distill.objectives import CrossEntropy, ForwardKL
from distill.tracking import NoTracker, read_metrics

VOCAB = 32
SETTINGS = TrainerSettings(
    steps=12,
    batch_size=4,
    micro_batch_size=4,
    sequence_length=32,
    learning_rate=1e-2,
    warmup_steps=2,
    precision=Precision.no,
    log_every=3,
    evaluate_every=4,
    checkpoint_every=5,
)


def make_trainer(folder, settings=SETTINGS, objective=None, evaluate=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform, so that there is something to learn
    )
    target = LlamaForCausalLM(config)
    drafter = ScratchLM(num_layers=1, hidden_size=32).build(target)
    draw = random.Random(0)
    examples = [
        Example(
            prompt_ids=[draw.randrange(VOCAB) for _ in range(draw.randrange(1, 9))],
            output_ids=[draw.randrange(VOCAB) for _ in range(draw.randrange(1, 17))],
        )
        for _ in range(64)
    ]
    return Trainer(
        Trainee(
            drafter,
            LMAlignment(drafter),
            objective or ForwardKL(),
            LiveTarget(target),
            settings.precision,
        ),
        BatchStream(
            [Pool(examples)],
            sequence_length=settings.sequence_length,
            batch_size=settings.batch_size,
            seed=0,
        ),
        settings,
        folder=folder,
        accelerator=Accelerator(cpu=True),
        tracker=NoTracker().start(folder, {}),
        evaluate=evaluate,
    )


def curve(folder):
    """Every figure of every line but the time."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same_curve(ours, theirs, rel=1e-5):
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, rel=rel, abs=1e-6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The curve of one undisturbed run, measured by a made-up τ that is best at step 8."""
    folder = tmp_path_factory.mktemp("plain")
    make_trainer(folder, evaluate=made_up_tau()).run()
    return folder


def made_up_tau():
    taus = iter([1.0, 1.5, 2.5, 2.5])  # steps 0, 4, 8, 12
    return lambda drafter: {"tau": next(taus), "alpha": 0.5}


@pytest.mark.parametrize("precision", [Precision.no, Precision.bf16])
def test_a_drafter_learns(tmp_path, precision):
    settings = replace(SETTINGS, steps=240, log_every=20, precision=precision)
    make_trainer(tmp_path, settings).run()
    first, *_, last = read_metrics(tmp_path / "metrics.jsonl")
    assert last["loss"] < 0.5 * first["loss"]
    assert last["alpha"] > first["alpha"] + 0.1
    assert last["top1_agreement"] > first["top1_agreement"]


def test_cross_entropy_needs_no_teacher(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, steps=2, log_every=2), CrossEntropy())
    assert trainer.model.teacher is None
    trainer.run()
    assert read_metrics(tmp_path / "metrics.jsonl")[0].keys() >= {"loss", "accuracy"}
    with pytest.raises(ValueError, match="needs a teacher"):
        Trainee(torch.nn.Linear(1, 1), None, ForwardKL(), None, Precision.no)


def test_accumulation_does_not_change_the_curve(tmp_path, plain):
    settings = replace(SETTINGS, micro_batch_size=1)
    make_trainer(tmp_path, settings, evaluate=made_up_tau()).run()
    assert_same_curve(curve(tmp_path), curve(plain))


def test_two_processes_give_the_curve_of_one(tmp_path, plain):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in curve(plain) if "loss" in line]
    assert_same_curve(curve(tmp_path), lines, rel=1e-4)


def test_the_best_checkpoint_has_the_best_tau_and_the_earlier_of_equals(tmp_path):
    result = make_trainer(tmp_path, evaluate=made_up_tau()).run()
    assert result.best.step == 8
    assert result.figures == {"tau": 2.5, "alpha": 0.5}
    kept = [checkpoint.step for checkpoint in checkpoints.checkpoints(tmp_path / "checkpoints")]
    assert kept == [8, 10, 12]  # the best, and the last two


@pytest.mark.parametrize("at", [5, 7, 10])
def test_a_killed_run_goes_on_exactly(tmp_path, plain, at):
    trainer = make_trainer(tmp_path, evaluate=made_up_tau())
    step = trainer._train_step

    def killed_step():
        if trainer.step == at:
            raise SystemExit("killed")
        step()

    trainer._train_step = killed_step
    with pytest.raises(SystemExit):
        trainer.run()
    resumed_from = checkpoints.latest(tmp_path / "checkpoints").step
    assert resumed_from == {5: 5, 7: 5, 10: 10}[at]
    taus = iter([2.5, 2.5] if resumed_from == 5 else [2.5])
    result = make_trainer(tmp_path, evaluate=lambda _: {"tau": next(taus), "alpha": 0.5}).run()
    assert curve(tmp_path) == curve(plain)
    assert result.best.step == 8


def test_ctrl_c_saves_and_passes_up(tmp_path, plain):
    trainer = make_trainer(tmp_path, evaluate=made_up_tau())
    step = trainer._train_step

    def interrupted_step():
        if trainer.step == 6:
            signal.raise_signal(signal.SIGINT)
        step()

    trainer._train_step = interrupted_step
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints.latest(tmp_path / "checkpoints").step == 7
    make_trainer(tmp_path, evaluate=lambda _: {"tau": 2.5, "alpha": 0.5}).run()
    assert curve(tmp_path) == curve(plain)  # also the line of step 9, of which 7 was in the middle


def test_a_finished_run_does_not_train_again(tmp_path):
    make_trainer(tmp_path).run()
    trainer = make_trainer(tmp_path)
    trainer._train_step = None
    assert trainer.run().best.step == 12


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_place(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, learning_rate=1e30, max_grad_norm=1e30))
    with pytest.raises(UserError, match=r"(loss|grad_norm) is (nan|inf) at step 3 .*learning rate"):
        trainer.run()
    assert checkpoints.latest(tmp_path / "checkpoints") is None


def test_learning_rate():
    settings = TrainerSettings(steps=10, warmup_steps=2, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [settings.learning_rate_at(step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert settings.learning_rate_at(10) == pytest.approx(0.1)
    linear = replace(settings, schedule=Schedule.linear)
    assert linear.learning_rate_at(6) == pytest.approx(0.55)
    assert replace(settings, schedule=Schedule.constant).learning_rate_at(9) == 1.0


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="micro_batch_size must be >= 1, got 0"):
        TrainerSettings(micro_batch_size=0)


if __name__ == "__main__":
    trainer = make_trainer(Path(sys.argv[1]))
    trainer.run()
    accelerator = trainer.accelerator
    del trainer
    part(accelerator)
