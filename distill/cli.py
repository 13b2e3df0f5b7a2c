"""`draftsmith <command>`: chooses a command; its module does the rest."""

import difflib
import importlib
import os
import sys
from importlib.metadata import version

# Each command's module has `main`, a Hydra app. Imported only when chosen: torch takes seconds.
COMMANDS = {
    "generate": (
        "distill.generate",
        "let the target answer prompts; the rows become training data",
    ),
    "train": ("distill.train", "align a drafter to the target"),
    "export": (
        "distill.export",
        "turn a checkpoint into a transformers folder, checked by reloading",
    ),
    "evaluate": (
        "distill.evaluate",
        "measure acceptance and speed of drafters; table and HTML report",
    ),
    "compare": ("distill.compare", "put the trainings of a sweep on one page: table and curves"),
    "pipeline": ("distill.pipeline", "all of the above in order, each step once"),
    "inspect": ("distill.inspect_rows", "print rows in colour and refuse broken ones"),
}

_LIST = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
HELP = f"""draftsmith: align a small drafter to a large model, and measure what it gains.

{_LIST}

  draftsmith pipeline experiment=quickstart   the whole life of three small drafters
  draftsmith train --help                     what can be chosen and set, with its values
  draftsmith train --cfg job                  the config that would run, and nothing else
  draftsmith train --multirun seed=0,1,2      one run for each value
  draftsmith train --config-dir ./my_conf experiment=mine     with configs of your own

Completion: eval "$(draftsmith --shell-completion install=bash)"   (or zsh, fish)
Every command is also a module: python -m distill.train is draftsmith train."""


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help", "help"):
        print(HELP)
    elif first == "--version":
        print(f"draftsmith {version('draftsmith')}")
    elif first in ("-sc", "--shell-completion"):
        _complete()
    elif first in COMMANDS:
        _run(first, arguments[1:])
    else:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        names = ", ".join(COMMANDS)
        print(f"draftsmith: no command {first!r}; {guess}there are: {names}", file=sys.stderr)
        raise SystemExit(2)


def _run(name: str, arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    importlib.import_module(COMMANDS[name][0]).main()


def _complete() -> None:
    """Hydra's completion, one word further: the command comes before the overrides.

    The shell passes the line typed so far in COMP_LINE and expects the choices on stdout.
    """
    words = os.environ.get("COMP_LINE", "").split(maxsplit=2)
    if len(words) > 1 and words[1] in COMMANDS:
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
        _run(words[1], sys.argv[1:])
    elif words:
        print("\n".join(COMMANDS))
    else:  # install and uninstall are the same for every command
        _run("train", sys.argv[1:])


if __name__ == "__main__":
    main()
