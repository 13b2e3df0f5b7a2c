"""Typed configs: schemas from dataclasses, objects from configs, and how a command starts.

A command and everything it is made of are frozen dataclasses. `schema_of` turns one into a Hydra
structured config, so that YAML and overrides are checked against its fields; `build` turns the
composed config back into objects; `command` puts both around `run()` and words every mistake of
the user as one sentence. No other module knows how objects come out of a config.
"""

import copy
import dataclasses
import functools
import importlib
import operator
import os
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import hydra
import psutil
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from distill.errors import UserError
from distill.explain import help_page, nearest, one_sentence

# The dataclasses behind the config groups. An option, conf/<group>/<option>.yaml, names one by
# `defaults: [/schema/<group>/<name>@_here_]`.
COMPONENTS: tuple[tuple[str, str, str], ...] = (
    ("target", "model", "distill.target.TargetSettings"),
    ("prompts", "standard_library", "distill.prompts.StandardLibraryPrompts"),
    ("prompts", "dataset", "distill.prompts.DatasetPrompts"),
    ("sampling", "params", "decode.SamplingParams"),
    ("acceptance", "greedy", "decode.acceptance.Greedy"),
    ("acceptance", "sampling", "decode.acceptance.SpeculativeSampling"),
    ("acceptance", "block", "decode.acceptance.BlockVerification"),
    ("acceptance", "k_sequence", "decode.acceptance.KSequence"),
    ("acceptance", "traversal", "decode.acceptance.TraversalVerification"),
    ("acceptance", "without_replacement", "decode.acceptance.RecursiveRejection"),
    ("acceptance", "lenient", "decode.acceptance.Lenient"),
    ("acceptance", "typical", "decode.acceptance.Typical"),
    ("acceptance", "top_tokens", "decode.acceptance.TopTokens"),
    ("acceptance", "near_tokens", "decode.acceptance.NearTokens"),
    ("acceptance", "rollback", "decode.acceptance.Rollback"),
    ("draft", "chain", "decode.drafters.Chains"),
    ("draft", "heuristic", "decode.drafters.HeuristicChains"),
    ("draft", "confidence", "decode.drafters.ConfidentChains"),
    ("draft", "cost_aware", "decode.drafters.CostAwareChains"),
    ("draft", "hybrid", "decode.drafters.HybridChains"),
    ("draft", "merged", "decode.drafters.MergedTrees"),
    ("draft", "expansion", "decode.drafters.ExpansionTrees"),
    ("draft", "planned", "decode.drafters.PlannedTrees"),
    ("draft", "dynamic", "decode.drafters.DynamicTrees"),
    ("drafter", "lm", "decode.models.ScratchLM"),
    ("model_free", "suffix", "decode.drafters.SuffixDrafts"),
    ("model_free", "token_recycling", "decode.drafters.TokenRecycling"),
    ("model_free", "prompt_lookup", "decode.drafters.PromptLookup"),
    ("model_free", "input_guided", "decode.drafters.InputGuided"),
    ("model_free", "ngram", "decode.drafters.NGram"),
    ("model_free", "rest", "decode.drafters.Rest"),
    ("drafter", "lm_from_target", "decode.models.TargetLayersLM"),
    ("drafter", "lm_from_checkpoint", "decode.models.CheckpointLM"),
    ("drafter", "lm_pruned", "decode.models.PrunedLM"),
    ("drafter", "medusa", "decode.models.Medusa"),
    ("drafter", "hydra", "decode.models.Hydra"),
    ("drafter", "blockwise", "decode.models.Blockwise"),
    ("drafter", "heads_from_checkpoint", "decode.models.HeadsCheckpoint"),
    ("objective", "cross_entropy", "distill.objectives.CrossEntropy"),
    ("objective", "forward_kl", "distill.objectives.ForwardKL"),
    ("objective", "reverse_kl", "distill.objectives.ReverseKL"),
    ("objective", "jensen_shannon", "distill.objectives.JensenShannon"),
    ("objective", "skewed_forward_kl", "distill.objectives.SkewedForwardKL"),
    ("objective", "skewed_reverse_kl", "distill.objectives.SkewedReverseKL"),
    ("objective", "total_variation", "distill.objectives.TotalVariation"),
    ("objective", "lk_alpha", "distill.objectives.LKAlpha"),
    ("objective", "lk_lambda", "distill.objectives.LKLambda"),
    ("objective", "greedy_acceptance", "distill.objectives.GreedyAcceptance"),
    ("objective", "end_to_end_tv", "distill.objectives.EndToEndTV"),
    ("objective", "adaspec", "distill.objectives.AdaSPEC"),
    ("depth_weights", "uniform", "distill.depth_weights.Uniform"),
    ("depth_weights", "decay", "distill.depth_weights.Decay"),
    ("depth_weights", "survival", "distill.depth_weights.Survival"),
    ("teacher", "live", "distill.teachers.stored.LiveTeacher"),
    ("teacher", "stored", "distill.teachers.stored.StoredTeacher"),
    ("data", "seq_kd", "distill.batches.SeqKD"),
    ("data", "text", "distill.batches.Text"),
    ("data", "on_policy", "distill.regimes.OnPolicy"),
    ("data", "mixed_tokens", "distill.regimes.MixedTokens"),
    ("data", "in_the_loop", "distill.regimes.InTheLoop"),
    ("data", "mixture", "distill.regimes.Mixture"),
    ("trainer", "loop", "distill.loop.TrainerSettings"),
    ("tracker", "none", "distill.tracking.NoTracker"),
    ("tracker", "wandb", "distill.tracking.WandbTracker"),
    ("tracker", "tensorboard", "distill.tracking.TensorBoardTracker"),
)

OURS = ("decode.", "distill.")
UNIONS = (typing.Union, types.UnionType)
SCHEMAS: dict[type[Any], type[Any]] = {}


def conf_dir() -> str:
    """The folder of the Hydra tree: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for directory in (here / "conf", here.parent / "conf"):
        if directory.is_dir():
            return str(directory)
    raise FileNotFoundError(f"no conf/ inside or beside {here}; install draftsmith again")


def command(name: str, settings: type[Any]) -> Callable[[], None]:
    """The Hydra app of one command.

    Args:
        name: the command; conf/<name>.yaml is its config.
        settings: a frozen dataclass with `run()`. A field `output` receives the output folder
            of the job, which in a multirun is a folder of its own.

    Returns:
        A function that reads `sys.argv`, composes, and runs. It exits with code 2 and one
        sentence on the user's mistakes, with 130 on Ctrl-C.
    """

    if settings.__module__ == "__main__":  # python -m distill.train: the class others know
        main_module = typing.cast(Any, sys.modules["__main__"])
        settings = vars(importlib.import_module(main_module.__spec__.name))[settings.__name__]

    def task(config: DictConfig) -> None:
        transformers_logging.disable_progress_bar()  # of loading and saving: ours tell more
        with one_sentence(name):  # inside, for Hydra meets what leaves a task with a traceback
            _construct_command(settings, config).run()

    def main() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises and leaves the wording to us
        sys.argv[1:] = sorted(sys.argv[1:], key=_is_override)  # argparse wants them in one piece
        with one_sentence(name):
            _refuse_null_options(sys.argv[1:])
            register(name, settings)
            hydra.main(version_base="1.3", config_path=conf_dir(), config_name=name)(task)()

    return main


def register(name: str, settings: type[Any]) -> None:
    """Give Hydra the schemas, the help page and the resolvers of one command."""
    store = ConfigStore.instance()
    for group, schema_name, path in COMPONENTS:
        store.store(
            group=f"schema/{group}", name=schema_name, node=schema_of(_import(path, (), ""))
        )
    trusted: Any = ("trusted_packages", list[str], dataclasses.field(default_factory=list))
    schema = dataclasses.make_dataclass(settings.__name__, [*_schema_fields(settings), trusted])
    store.store(name=f"{name}_schema", node=schema)
    store.store(
        group="hydra/help", name="draftsmith", node={"template": help_page(name, Path(conf_dir()))}
    )
    OmegaConf.register_new_resolver("started", _started, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("required", _required, replace=True)


def schema_of(component: type[Any]) -> type[Any]:
    """A structured config with the fields, types and defaults of a dataclass, and its `_target_`.

    Nested dataclasses become nested schemas, paths strings, and everything that YAML cannot type
    (protocols, unions of components) `Any`: there the chosen option brings its own schema.
    """
    if component not in SCHEMAS:  # one class per component, or OmegaConf refuses to merge them
        target: Any = ("_target_", str, f"{component.__module__}.{component.__qualname__}")
        fields = [target, *_schema_fields(component)]
        SCHEMAS[component] = dataclasses.make_dataclass(component.__name__, fields)
    return SCHEMAS[component]


def build(node: Any, *, trusted: Sequence[str] = ()) -> Any:
    """The object a config node describes, nested objects included.

    Args:
        node: a config or plain containers; a mapping with `_target_` becomes that class.
        trusted: packages besides our own whose classes a config may name.

    Raises:
        UserError: a class outside the trusted packages, an unknown key, a refused value.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return _build(plain, Any, tuple(f"{package}." for package in trusted), "")


def _schema_fields(component: type[Any]) -> list[Any]:
    hints = typing.get_type_hints(component)
    fields = []
    for field in dataclasses.fields(component):
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = MISSING if field.default is dataclasses.MISSING else field.default
        hint = _schema_type(hints[field.name])
        if hint is Any and dataclasses.is_dataclass(value):
            value = MISSING  # a plug point: its group chooses, and brings the schema along
        value = _schema_value(value)
        if typing.get_origin(hint) is dict:  # `drafters.mine=...` may add what is not there yet
            item = typing.get_args(hint)[1]
            value = DictConfig({} if value == MISSING else value, key_type=str, element_type=item)
            OmegaConf.set_struct(value, False)
        default = functools.partial(copy.deepcopy, value)
        fields.append((field.name, hint, dataclasses.field(default_factory=default)))
    return fields


def _schema_type(hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Path:
        return str
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return schema_of(hint)
    if origin in UNIONS:
        inner = [_schema_type(a) for a in arguments if a is not types.NoneType]
        if Any in inner or (len(inner) > 1 and any(map(dataclasses.is_dataclass, inner))):
            return Any
        return functools.reduce(
            operator.or_, [*inner, None] if types.NoneType in arguments else inner
        )
    if origin in (list, tuple, Sequence, Iterable):
        return list[_schema_type(arguments[0])]  # type: ignore[misc]
    if origin in (dict, Mapping):
        return dict[str, _schema_type(arguments[1])]  # type: ignore[misc]
    is_plain = isinstance(hint, type) and (
        hint in (bool, int, float, str) or issubclass(hint, Enum)
    )
    return hint if is_plain else Any


def _schema_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _schema_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return schema_of(type(value))(**fields)
    if isinstance(value, tuple | list):
        return [_schema_value(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _schema_value(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _build(value: Any, hint: Any, trusted: tuple[str, ...], where: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    inner = next((typing.get_args(o) for o in options if typing.get_origin(o)), ())
    exact = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    if isinstance(value, dict):
        if "_target_" in value or len(exact) == 1:
            fields = {key: item for key, item in value.items() if key != "_target_"}
            component = exact[0] if len(exact) == 1 else _import(value["_target_"], trusted, where)
            return _construct(component, fields, trusted, where)
        return {
            k: _build(v, inner[1:] and inner[1], trusted, f"{where}.{k}") for k, v in value.items()
        }
    if isinstance(value, list):
        items = [
            _build(v, inner[:1] and inner[0], trusted, f"{where}.{i}") for i, v in enumerate(value)
        ]
        return tuple(items) if any(typing.get_origin(o) is tuple for o in options) else items
    return Path(value).expanduser() if isinstance(value, str) and Path in options else value


def _construct(
    component: type[Any], fields: dict[str, Any], trusted: tuple[str, ...], where: str
) -> Any:
    hints = typing.get_type_hints(component)
    known = [field.name for field in dataclasses.fields(component)]
    prefix = f"{where}." if where else ""
    if unknown := [key for key in fields if key not in known]:
        key = f"{prefix}{unknown[0]}"
        raise UserError(f"unknown key {key!r}", None, nearest(key, known))
    built = {k: _build(v, hints[k], trusted, prefix + k) for k, v in fields.items()}
    try:
        return component(**built)
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where or None) from error


def _import(path: str, trusted: tuple[str, ...], where: str) -> type[Any]:
    """The class at `path`, if it is a dataclass that one of the allowed packages defines."""
    allowed = OURS + trusted
    found = None
    if path.startswith(allowed):
        module, _, name = path.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot import {path!r}", where or None, str(error)) from error
    # The class's own module counts: a name that distill.x has imported must not pass as ours.
    ours = isinstance(found, type) and f"{found.__module__}.".startswith(allowed)
    if not isinstance(found, type) or not ours or not dataclasses.is_dataclass(found):
        hint = f"trusted_packages=[{path.split('.')[0]}] allows it if you trust that code"
        raise UserError(f"{path!r} is no settings class of draftsmith", where or None, hint)
    return found


def _construct_command(settings: type[Any], config: DictConfig) -> Any:
    """The command object of a composed config; the resolved config is kept in the output."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        _required(missing[0])
    if "output" in config:
        config.output = HydraConfig.get().runtime.output_dir
        OmegaConf.save(config, Path(config.output) / ".hydra" / "config.yaml", resolve=True)
    fields = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    trusted = tuple(f"{package}." for package in fields.pop("trusted_packages"))
    return _construct(settings, fields, trusted, "")


def _required(key: str) -> typing.NoReturn:
    raise UserError(f"{key!r} has no value", None, f"give one: {key}=...")


def _is_override(argument: str) -> bool:
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def _refuse_null_options(arguments: Iterable[str]) -> None:
    """Hydra meets `lora=null` with a traceback: of a group one of its files is chosen.

    Raises:
        UserError: one is no file.
    """
    for argument in arguments:
        key, _, value = argument.partition("=")
        group = key.lstrip("+").partition("@")[0]
        folder = Path(conf_dir(), group)
        if group and "null" in value.split(",") and folder.is_dir():
            names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
            raise UserError(
                f"{group} cannot be null on the command line",
                None,
                f"leave {key} out for its default, or choose one of {names}",
            )


def _started() -> str:
    """When the run began, as a folder name: the same for all processes of one launcher."""
    num_processes = os.environ.get("WORLD_SIZE")
    if num_processes != os.environ.get("LOCAL_WORLD_SIZE", num_processes):
        raise UserError("several machines must write to one folder", None, "name it: output=FOLDER")
    launcher = psutil.Process(os.getppid()) if "LOCAL_RANK" in os.environ else None
    seconds = launcher.create_time() if launcher else time.time()
    return time.strftime("%Y-%m-%d_%H-%M-%S", time.localtime(seconds))
