"""Heads on two processes: the curve of one, with a frozen target and with one that learns too.

Run as a script it is one training of each kind, on as many processes as torchrun starts.
"""

import os
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decode.models import Hydra, Medusa
from distill.lora import LoraSettings
from distill.tracking import read_metrics
from tests.distill import tiny
from tests.distill.tiny import VOCAB, llama, save_target, training

KINDS = ("frozen", "joint")


@dataclass(frozen=True)
class Numbers(tiny.Numbers):
    """Examples are of unequal length."""

    def ids(self, number):
        draw = random.Random(f"{self.seed} {number}")
        return [draw.randrange(3, VOCAB) for _ in range(draw.randrange(4, 9))]


def make_train(kind, folder):
    """Four packs a step, one at a time on each process."""
    train = training(
        folder / "target",
        folder / kind,
        Numbers(40, seed=1),
        Numbers(3, seed=2),
        steps=6,
        batch_size=4,
        micro_batch_size=1,
        learning_rate=0.01,
        warmup_steps=0,
        log_every=1,
        evaluate_every=6,
        checkpoint_every=6,
    )
    train = replace(train, drafter=Medusa(num_heads=2))
    if kind == "frozen":
        return train
    hydra = Hydra(num_heads=2, num_layers=2, prefix_attention=True)
    return replace(train, drafter=hydra, lora=LoraSettings(rank=2))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Both kinds, trained on two processes."""
    folder = tmp_path_factory.mktemp("two")
    save_target(folder / "target", llama(num_layers=2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(folder)]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_heads_on_two_processes_learn_as_on_one(two, tmp_path, kind):
    save_target(tmp_path / "target", llama(num_layers=2))
    make_train(kind, tmp_path).run()
    ours, theirs = (
        [line for line in read_metrics(folder / kind / "metrics.jsonl") if "loss" in line]
        for folder in (two, tmp_path)
    )
    assert len(ours) == len(theirs) == 6
    for our, their in zip(ours, theirs, strict=True):
        their["tokens_per_second"] = our["tokens_per_second"]
        assert our == pytest.approx(their, rel=1e-3, abs=1e-6)
    for name in ("model.safetensors", *(["target/model.safetensors"] if kind == "joint" else [])):
        ours, theirs = (load_file(folder / kind / "drafter" / name) for folder in (two, tmp_path))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    for kind in KINDS:
        make_train(kind, Path(sys.argv[1])).run()
