"""Trackers, and the metrics file that is always written."""

import builtins
import io

import pytest

from distill.errors import UserError
from distill.progress import Progress
from distill.tracking import (
    MetricsFile,
    NoTracker,
    TensorBoardTracker,
    WandbMode,
    WandbTracker,
    read_metrics,
)


def test_metrics_are_on_disk_at_once_and_cut_off_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path)
    for step in (1, 2, 3):
        log.log(step, {"loss": 1.0 / step})
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    resumed = MetricsFile(path, resumed_step=2)
    resumed.log(3, {"loss": 0.25})
    resumed.finish()
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 0.5, 0.25]


def test_a_run_from_the_beginning_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).log(1, {"loss": 1.0})
    MetricsFile(path)
    assert read_metrics(path) == []


def test_no_tracker(tmp_path):
    run = NoTracker().start(tmp_path, {})
    run.log(1, {"loss": 1.0})
    run.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # of its dependencies
def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    run = TensorBoardTracker().start(tmp_path, {"seed": 0})
    run.log(1, {"loss": 1.0})
    run.finish()
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline_without_login(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = WandbTracker(mode=WandbMode.offline).start(tmp_path, {"seed": 0})
    run.log(1, {"loss": 1.0})
    run.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("tracker", "package"), [(WandbTracker(), "wandb"), (TensorBoardTracker(), "tensorboard")]
)
def test_a_missing_tracker_is_named(tracker, package, tmp_path, monkeypatch):
    plain_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == package or name == f"torch.utils.{package}":
            raise ImportError(name)
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=f"pip install {package}"):
        tracker.start(tmp_path, {})


def test_progress_line_off_a_terminal():
    stream = io.StringIO()
    with Progress(10, unit="steps", label="train", stream=stream) as progress:
        progress.skip(4)
        progress.advance(1, tokens=100, loss=2.5)
        progress.advance(1, tokens=100, loss=2.25)
    text = stream.getvalue()
    assert text.startswith("train 6/10 steps  ")
    assert text.count("\n") == 1
    assert "loss 2.25" in text
    assert "tokens/s" in text
    assert "left " in text
