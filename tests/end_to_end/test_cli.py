"""`draftsmith` as typed into a shell."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from distill import cli

ROOT = Path(__file__).parents[2]


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_help_lists_every_command_without_importing_torch() -> None:
    code = "import sys; from distill.cli import main; main(); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        expected = version("draftsmith")
    except PackageNotFoundError:
        pytest.skip("draftsmith is not installed, it only lies on the path")
    monkeypatch.setattr(sys, "argv", ["draftsmith", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"draftsmith {expected}\n"


def test_an_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["draftsmith", "evalute"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "did you mean 'evaluate'?" in capsys.readouterr().err


def test_completion_begins_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["draftsmith", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "draftsmith tra")
    cli.main()
    assert capsys.readouterr().out.split() == list(cli.COMMANDS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("draftsmith generate samp", "sampling="),
        ("draftsmith generate sampling=", "sampling=temperature"),
        ("draftsmith generate sampling.temp", "sampling.temperature="),
    ],
)
def test_completion_goes_on_with_the_overrides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["draftsmith", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", line)
    cli.main()
    assert expected in capsys.readouterr().out.split()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_page(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["draftsmith", name, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    page = capsys.readouterr().out
    assert page.startswith(f"draftsmith {name}: ")
    assert page.count(f"  draftsmith {name} ") >= 3
    assert "schema" not in page


def test_a_module_is_the_same_command(tmp_path: Path) -> None:
    done = shell("distill.train", "--cfg", "job", f"output={tmp_path}", "seed=7")
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout


def test_an_unknown_key_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = shell("distill.train", "trainer.stps=3", f"output={output}")
    assert done.returncode == 2
    assert "unknown key 'trainer.stps'; did you mean 'trainer.steps'?" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not output.exists()
