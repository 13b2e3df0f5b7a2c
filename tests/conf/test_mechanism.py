"""The config mechanism itself, on a command and a Hydra tree small enough to read."""

import errno
import os
import sys
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
from omegaconf import OmegaConf

from distill import config
from distill.errors import UserError


class Colour(Enum):
    red = "red"
    blue = "blue"


class Shape(Protocol):
    def area(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float = 1.0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius must be >= 0, got {self.radius}")


@dataclass(frozen=True, kw_only=True)
class Pen:
    colour: Colour = Colour.red
    widths: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Draw:
    pen: Pen
    shape: Shape
    shapes: dict[str, Shape] = field(default_factory=dict)
    pens: dict[str, Pen] = field(default_factory=dict)
    names: dict[str, str]
    title: str
    error: str = ""
    output: Path

    def run(self) -> None:
        drawn.append(self)
        match self.error:
            case "disk":
                raise OSError(errno.ENOSPC, "No space left on device", "rows/0001")
            case "stop":
                raise KeyboardInterrupt
            case "user":
                raise UserError("line 17 is no JSON", "prompts.jsonl", "mend it")
            case "bug":
                raise RuntimeError("ours")


drawn: list[Draw] = []

TREE = {
    "draw.yaml": """\
# Draws a shape.
defaults:
  - draw_schema
  - _self_
  - pen: thin
  - shape: circle
  - experiment: null
  - override hydra/help: draftsmith
  - override hydra/output: draftsmith
  - override hydra/job_logging: draftsmith
title: untitled
output: runs/draw/${started:}
""",
    "pen/thin.yaml": "# A thin pen.\ndefaults: [/schema/pen/thin@_here_]\nwidths: [1]\n",
    "shape/circle.yaml": "# A circle.\ndefaults: [/schema/shape/circle@_here_]\n",
    "shape/foreign.yaml": "# Not ours.\n_target_: distill.config.os.system\ncommand: ls\n",
    "experiment/big.yaml": "# @package _global_\ntitle: big\nshape: {radius: 9}\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    real = Path(config.conf_dir())
    for name, text in TREE.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    (tmp_path / "conf" / "hydra").symlink_to(real / "hydra")
    here = Draw.__module__
    components = (("pen", "thin", f"{here}.Pen"), ("shape", "circle", f"{here}.Circle"))
    monkeypatch.setattr(config, "conf_dir", lambda: str(tmp_path / "conf"))
    monkeypatch.setattr(config, "COMPONENTS", components)
    monkeypatch.setattr(config, "OURS", (*config.OURS, f"{here}."))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.chdir(tmp_path)
    drawn.clear()
    return tmp_path


def draw(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """Runs the command as a shell would; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["draftsmith", *overrides])
    try:
        config.command("draw", Draw)()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_config_becomes_the_object(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["output=my folder", "pen.colour=blue", "shape.folder=a/b", "shape.radius=2"]
    assert draw(monkeypatch, *overrides) == 0
    assert drawn == [
        Draw(
            pen=Pen(colour=Colour.blue, widths=(1,)),
            shape=Circle(radius=2.0, folder=Path("a/b")),  # type: ignore[arg-type]
            names={},
            title="untitled",
            output=tree / "my folder",
        )
    ]
    saved = OmegaConf.load(tree / "my folder" / ".hydra" / "config.yaml")
    assert saved.output == str(tree / "my folder")
    assert Path.cwd() == tree


def test_the_default_output_is_one_folder_per_start(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw(monkeypatch) == 0
    assert drawn[0].output.parent == tree / "runs" / "draw"


def test_processes_of_one_launcher_share_the_default_output(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    began = time.localtime(psutil.Process(os.getppid()).create_time())
    assert draw(monkeypatch) == 0
    assert drawn[0].output.name == time.strftime("%Y-%m-%d_%H-%M-%S", began)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert draw(monkeypatch) == 2
    assert "output=FOLDER" in capsys.readouterr().err


def test_multirun_gives_each_job_its_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw(monkeypatch, "output=sweep", "--multirun", "shape.radius=1,2") == 0
    assert [d.output for d in drawn] == [tree / "sweep" / "0", tree / "sweep" / "1"]
    assert [d.shape.radius for d in drawn] == [1.0, 2.0]  # type: ignore[attr-defined]


def test_an_experiment_wins_over_the_primary_file_and_loses_to_the_command_line(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(monkeypatch, "experiment=big", "shape.radius=3")
    assert (drawn[0].title, drawn[0].shape.radius) == ("big", 3.0)  # type: ignore[attr-defined]


def test_a_mapping_takes_new_names_but_no_unknown_keys(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(monkeypatch, "+pen@pens.big=thin", "pens.big.widths=[9]", "names.a=b") == 0
    assert drawn[0].pens == {"big": Pen(widths=(9,))}
    assert drawn[0].names == {"a": "b"}
    assert draw(monkeypatch, "+pen@pens.big=thin", "pens.big.width=9") == 2
    assert "did you mean 'pens.big.widths'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["shape.radus=2"], ["unknown key 'shape.radus'", "did you mean 'shape.radius'?"]),
        (["tilte=x"], ["unknown key 'tilte'", "did you mean 'title'?"]),
        (["+shape.colour=red"], ["unknown key 'shape.colour'", "there are: folder, radius"]),
        (["shape.radius=wide"], ["shape.radius", "'wide'", "Float"]),
        (["pen.colour=green"], ["pen.colour", "green", "red, blue"]),
        (["pen=null"], ["pen cannot be null", "choose one of thin"]),
        (["--multirun", "pen=null,thin"], ["pen cannot be null"]),
        (["shape=cirlce"], ["shape has no option 'cirlce'", "did you mean 'circle'?"]),
        (["title=???"], ["'title' has no value", "title=..."]),
        (["title=a=b"], ["cannot read 'title=a=b'"]),
        (["title"], ["cannot read 'title'"]),
        (["title=${nothing}"], ["nothing"]),
        (["shape.radius=-1"], ["radius must be >= 0, got -1.0 (shape)"]),
        (["shape=foreign"], ["'distill.config.os.system'"]),
        (["--multirun", "shape.radus=1,2"], ["unknown key 'shape.radus'"]),
        (["--cfg", "job", "shape.radus=1"], ["unknown key 'shape.radus'"]),
        (["--config-dir", "nowhere"], ["nowhere"]),
        (["error=user"], ["line 17 is no JSON (prompts.jsonl); mend it"]),
        (["output=conf/draw.yaml"], ["there is a file where a folder is needed"]),
        (["error=disk"], ["the disk is full (rows/0001)"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_a_mistake_is_one_sentence_and_code_2(
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    parts: list[str],
) -> None:
    assert draw(monkeypatch, *overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("draftsmith draw: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_ctrl_c_is_one_sentence_and_code_130(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(monkeypatch, "error=stop") == 130
    assert "run the same command again" in capsys.readouterr().err


def test_our_own_errors_keep_their_traceback(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ours"):
        draw(monkeypatch, "error=bug")


def test_help_shows_choices_and_values(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(monkeypatch, "--help") == 0
    page = capsys.readouterr().out
    assert page.startswith("Draws a shape.\n")
    assert "A thin pen." in page
    assert "radius: 1.0" in page
    assert "schema" not in page


def test_foreign_classes_need_trust() -> None:
    node = {"_target_": "fractions.Fraction", "numerator": 1}
    with pytest.raises(UserError, match="trusted_packages"):
        config.build(node)
    borrowed: dict[str, Any] = {"_target_": "distill.config.Path"}
    with pytest.raises(UserError, match="no settings class of draftsmith"):
        config.build(borrowed)


def test_built_values_have_the_types_of_the_fields() -> None:
    node = OmegaConf.create({"_target_": f"{Pen.__module__}.Pen", "widths": [3]})
    with pytest.raises(UserError):
        config.build(node)
    assert config.build(node, trusted=[Pen.__module__]) == Pen(widths=(3,))
