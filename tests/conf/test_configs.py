"""The Hydra tree: every option builds, every command composes, an experiment's values win."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from distill import config
from distill.cli import COMMANDS

ROOT = Path(config.conf_dir())
# The others are typed by the command's own field; that they compose is tested with the commands.
GROUPS = [path for path in sorted(ROOT.glob("*/*.yaml")) if "/schema/" in path.read_text()]
EXPERIMENTS = sorted(ROOT.glob("experiment/*.yaml"))
# What an option leaves to the user, here with something that is accepted.
GIVEN = {
    "target/hf": "target.path=somewhere",
    "prompts/dataset": "prompts.path=prompts.jsonl",
    "drafter/lm_from_checkpoint": "drafter.path=somewhere",
    "drafter/heads_from_checkpoint": "drafter.path=somewhere",
    "objective/adaspec": "objective.reference=somewhere",
    "draft/planned": "draft.parents=[0,0,1] draft.ranks=[0,1,0]",
}


def path_id(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


@pytest.fixture(scope="module", autouse=True)
def schemas() -> None:
    ConfigStore.instance().store(name="empty", node={})
    for name, (module, _) in COMMANDS.items():
        config.register(name, command_class(module))


def command_class(module: str) -> type[Any]:
    name = module.rpartition(".")[2].removesuffix("_rows").capitalize()
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize("path", GROUPS, ids=path_id)
def test_an_option_composes_and_builds_its_class(path: Path) -> None:
    option = path_id(path)
    given = GIVEN.get(option, "").split()
    node = composed("empty", f"+{option.replace('/', '=')}", *given)[path.parent.name]
    if "_target_" not in node:  # of a group of which several can be chosen: a name and its settings
        (node,) = node.values()
    built = config.build(node)
    assert f"{type(built).__module__}.{type(built).__qualname__}" == node._target_


def test_every_component_has_an_option() -> None:
    named = "\n".join(path.read_text() for path in GROUPS)
    unused = [c for c in config.COMPONENTS if f"/schema/{c[0]}/{c[1]}@" not in named]
    assert not unused


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_composes_with_each_option_of_its_groups(name: str) -> None:
    chosen = OmegaConf.load(ROOT / f"{name}.yaml").defaults
    groups = [next(iter(entry)) for entry in chosen if isinstance(entry, DictConfig)]
    for group in (g for g in groups if not g.startswith(("override", "experiment"))):
        for path in sorted((ROOT / group.split("@")[0]).glob("*.yaml")):
            composed(name, f"{group}={path.stem}")


@pytest.mark.parametrize(("name", "module"), [(n, m) for n, (m, _) in COMMANDS.items()])
def test_a_command_asks_only_for_what_has_no_default(name: str, module: str) -> None:
    """A plug point with a default needs a group in conf/<command>.yaml that chooses it."""
    fields = {field.name: field for field in dataclasses.fields(command_class(module))}
    for key in OmegaConf.missing_keys(composed(name)):
        field = fields[key.partition(".")[0]]
        assert field.default is dataclasses.MISSING, key
        assert field.default_factory is dataclasses.MISSING, key


@pytest.mark.parametrize("path", sorted(ROOT.glob("**/*.yaml")), ids=path_id)
def test_a_file_says_first_what_it_is(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert not first.startswith("# @package") or second.startswith("# ")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=path_id)
def test_the_values_of_an_experiment_win(path: Path) -> None:
    """Guards the place of `_self_` in the primary files: after the groups it would win instead."""
    text = path.read_text()
    command = next(name for name in COMMANDS if f"draftsmith {name} experiment={path.stem}" in text)
    wanted = OmegaConf.load(path)
    wanted.pop("defaults", None)
    found = composed(command, f"experiment={path.stem}")
    for key, value in leaves(OmegaConf.to_container(wanted)):
        assert str(OmegaConf.select(found, key)) in (str(value), f"{type(value)}.{value}"), key


def leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(prefix.rstrip("."), node)]
    return [leaf for key, item in node.items() for leaf in leaves(item, f"{prefix}{key}.")]


def test_what_an_option_cannot_know_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["draftsmith", "target=hf", f"output={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        config.command("generate", command_class("distill.generate"))()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == "draftsmith generate: 'target.path' has no value; give one: target.path=...\n"
