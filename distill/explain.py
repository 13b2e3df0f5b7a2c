"""What a command says: one sentence for a mistake, and the page for --help."""

import difflib
import errno
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from distill.errors import UserError


@contextmanager
def one_sentence(name: str) -> Iterator[None]:
    """Ends the process with one sentence on a mistake of the user; our own errors go through."""
    try:
        yield
    except KeyboardInterrupt:
        stop = "stopped; what was written is kept; run the same command again to go on"
        _fail(name, stop, 130)
    except BrokenPipeError:  # `draftsmith inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        _fail(name, sentence, 2)


def _fail(name: str, sentence: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"draftsmith {name}: {sentence}", file=sys.stderr)
    raise SystemExit(code) from None


def explain(error: Exception) -> str | None:
    """One sentence for a mistake the user can mend; None for an error of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        quoted = f"'{error.override.split('=')[0]}=\"...\"'"
        return f"cannot read {error.override!r}; write key=value, odd characters quoted: {quoted}"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group} has no option {option!r}; {nearest(option, error.options)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        return _explain_config(cause)
    return _explain_os(error)


def _explain_config(error: Exception) -> str:
    key = getattr(error, "full_key", None) or ""
    first = str(error).splitlines()[0]
    _, is_ours, message = first.partition("UserError raised while resolving interpolation: ")
    if is_ours:
        return message
    if isinstance(error, ConfigKeyError | AttributeError) and key:
        parent = getattr(error, "parent_node", None)
        known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        return f"unknown key {key!r}; {nearest(key, known)}"
    if isinstance(error, ValidationError) and key:
        return f"{key}: {first[0].lower()}{first[1:]}"
    return " ".join(str(error).split())


def _explain_os(error: Exception) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return f"the disk is full{where}; free some space and run the same command again to go on"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}; choose another folder, output=FOLDER"
    if number in (errno.EEXIST, errno.ENOTDIR):
        return f"there is a file where a folder is needed{where}; choose another, output=FOLDER"
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """What was probably meant, and all there is; of a dotted key, `known` are the siblings."""
    parent, dot, last = word.rpartition(".")
    names = sorted(name for name in known if not name.startswith("_") and name != "hydra")
    close = difflib.get_close_matches(last, names, n=1)
    guess = f"did you mean {parent + dot + close[0]!r}? " if close else ""
    return f"{guess}there are: {', '.join(names)}" if names else "nothing can be set there"


def help_page(name: str, root: Path) -> str:
    """Hydra's help template of a command, from what its config says of itself.

    Args:
        name: the command.
        root: the Hydra tree. The comment that heads <name>.yaml comes first, then the groups it
            chooses from, their options by the first comment line of each.
    """
    choices: dict[str, list[str]] = {}  # group -> the keys it fills, as they are overridden
    for entry in OmegaConf.load(root / f"{name}.yaml").defaults:
        key = str(next(iter(entry))) if isinstance(entry, DictConfig) else ""
        if key and not key.startswith("override "):
            choices.setdefault(key.partition("@")[0], []).append(key)
    lines = [*_heading(root / f"{name}.yaml"), "", "Choose (group=option):"]
    for group, keys in choices.items():
        texts = {file.stem: _heading(file)[0] for file in sorted((root / group).glob("*.yaml"))}
        if group == "experiment":
            texts = {option: text for option, text in texts.items() if f" {name} " in text}
        lines += [f"  {', '.join(keys)}"] if texts else []
        lines += [f"    {option:<21} {text}" for option, text in texts.items()]
    lines += ["", "Set (key=value; these are the values of the choices above):", ""]
    text = "\n".join(lines).replace("$", "$$")
    flags = "--cfg job prints the config, --multirun a=1,2 runs each; draftsmith --help tells more"
    return f"{text}\n$CONFIG\n{flags}"


def _heading(path: Path) -> list[str]:
    """The comment at the top of a file, without Hydra's own first line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return [line[2:] for line in comment if not line.startswith("# @")] or [""]
