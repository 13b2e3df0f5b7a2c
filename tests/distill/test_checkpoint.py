"""Checkpoints: exact, whole or absent, refused when damaged."""

import json
import shutil

import pytest
import torch

from distill import checkpoint as checkpoints
from distill.errors import UserError


def trained(seed=0, steps=2):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True
    )
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model, optimizer):
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_run_goes_on_exactly(tmp_path):
    model, optimizer = trained()
    checkpoints.save(tmp_path, 2, model, optimizer, {"tokens": 5.0, "best": None})
    other, other_optimizer = trained(steps=0)
    found = checkpoints.latest(tmp_path)
    assert found.step == 2
    assert found.state() == {"tokens": 5.0, "best": None}
    found.restore_model(other)
    found.restore_optimizer(other, other_optimizer)
    train_step(model, optimizer)
    train_step(other, other_optimizer)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_tied_weights_are_stored_once(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters())
    saved = checkpoints.save(tmp_path, 0, model, optimizer, {})
    saved.restore_model(model)
    assert model["b"].weight is model["a"].weight


def test_half_written_folders_are_ignored_and_removed_by_pruning(tmp_path):
    model, optimizer = trained()
    for step in (10, 20, 30, 40):
        checkpoints.save(tmp_path, step, model, optimizer, {})
    shutil.copytree(tmp_path / "step-00000040", tmp_path / "step-00000050.partial")
    assert checkpoints.latest(tmp_path).step == 40
    checkpoints.prune(tmp_path, keep=2, best=10)
    assert [c.step for c in checkpoints.checkpoints(tmp_path)] == [10, 30, 40]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name, damage):
    saved = checkpoints.save(tmp_path, 7, *trained(), {"tokens": 1})
    file = saved.path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-5])
    elif name != "state.json":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.write_text(json.dumps({"state": {}}))
    with pytest.raises(UserError, match=r"damaged.*step-00000007.*remove this folder"):
        checkpoints.latest(tmp_path).state()


def test_a_checkpoint_of_another_drafter_is_refused(tmp_path):
    saved = checkpoints.save(tmp_path, 1, *trained(), {})
    with pytest.raises(UserError, match="another drafter"):
        saved.restore_model(torch.nn.Linear(3, 4))


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoints.save(tmp_path, 1, model, optimizer, {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(UserError, match=r"No space left.*step-00000002"):
        checkpoints.save(tmp_path, 2, model, optimizer, {})
    assert [c.step for c in checkpoints.checkpoints(tmp_path)] == [1]
    assert not list(tmp_path.glob("*.partial"))
