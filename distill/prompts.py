"""Prompts: from the standard library, a file or the hub, as ids of the target's tokenizer."""

import difflib
import enum
import hashlib
import json
import random
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
from transformers import PreTrainedTokenizerBase

from distill.errors import UserError
from distill.standard_library import SPLITS, Piece, pieces

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model continues.

    Attributes:
        id: content hash of the ids.
        ids: token ids, BOS included where the tokenizer adds one.
        text: what they were made from.
        reference: the text that follows in the data, where there is one.
        source: where it comes from, for people.
        material: token ids of a text that outputs are likely to copy from, for drafters only.
        category: what kind of prompt it is, for reports; "" where that is not known.
    """

    id: str
    ids: list[int]
    text: str
    reference: str | None
    source: str
    material: Sequence[int] = ()
    category: str = ""


class PromptSettings(Protocol):
    """Where prompts come from."""

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The prompts, each once."""
        ...


@dataclass(frozen=True, kw_only=True)
class StandardLibraryPrompts:
    """Beginnings of pieces of the running interpreter's standard library.

    Attributes:
        split: target, distill or evaluate; modules belong to one of them only.
        limit: how many, a random choice; a smaller limit is a part of a larger one.
        prompt_tokens: longest prompt.
        seed: of the choice.
    """

    split: str = "distill"
    limit: int | None = None
    prompt_tokens: int = 128
    seed: int = 0

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The prompts, in random order.

        Raises:
            UserError: the split is unknown, or this interpreter comes without its library.
        """
        if self.split not in SPLITS:
            raise UserError(
                f"the standard library has no split {self.split!r}",
                hint=f"there are: {', '.join(SPLITS)}",
            )
        _check_limit(self.limit)
        found = list(pieces(self.split))
        if not found:
            raise UserError(
                f"this Python has no source of its standard library in the split {self.split!r}",
                hint="use prompts=dataset with a file of your own",
            )
        random.Random(self.seed).shuffle(found)
        prompts: dict[str, Prompt] = {}
        for piece in found:
            if self.limit is not None and len(prompts) >= self.limit:
                break
            prompt = self._beginning(piece, tokenizer)
            if prompt is not None:
                prompts.setdefault(prompt.id, prompt)
        return list(prompts.values())

    def _beginning(self, piece: Piece, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
        """Whole lines, at most two thirds of the piece and `prompt_tokens` tokens."""
        text = ""
        for line in piece.text.splitlines(keepends=True):
            longer = text + line
            if len(longer) > len(piece.text) * 2 / 3:
                break
            if len(tokenizer(longer, verbose=False)["input_ids"]) > self.prompt_tokens:
                break
            text = longer
        # The newline goes to what follows: before an indented line it is one token with the indent.
        text = text.rstrip("\n")
        if not text.strip():
            return None
        ids = tokenizer(text, verbose=False)["input_ids"]
        source = f"{piece.module}:{piece.index}"
        parts = piece.module.split(".")
        is_test = any(part in ("test", "tests") or part.startswith("test_") for part in parts)
        category = "tests" if is_test else "library"
        rest = piece.text[len(text) :]
        return Prompt(prompt_id(ids), ids, text, rest, source, category=category)


class ChatTemplate(enum.Enum):
    """When prompts are rendered as a chat."""

    auto = "auto"  # where the tokenizer has a template
    always = "always"
    never = "never"


@dataclass(frozen=True, kw_only=True)
class DatasetPrompts:
    """Prompts from a file, a folder of files, or a dataset of the hub, through `datasets`.

    Attributes:
        path: a .json, .jsonl, .parquet, .csv or .txt file, a folder of them, or a hub id.
        name: configuration of a hub dataset.
        split: of a hub dataset.
        prompt_column: holds the text; "text" for .txt files, of which every line is a prompt.
        messages_column: holds chats instead, [{"role": ..., "content": ...}, ...].
        reference_column: holds the text that follows, for data=text.
        material_column: holds a text that outputs are likely to copy from, for drafters only.
        category_column: holds what reports split their figures by.
        chat_template: whether a plain prompt is rendered as a user's message.
        limit: how many, a random choice; a smaller limit is a part of a larger one.
        max_prompt_tokens: longer prompts are left out, and counted in a warning.
        seed: of the choice.
    """

    path: str
    name: str | None = None
    split: str = "train"
    prompt_column: str = "prompt"
    messages_column: str | None = None
    reference_column: str | None = None
    material_column: str | None = None
    category_column: str | None = None
    chat_template: ChatTemplate = ChatTemplate.auto
    limit: int | None = None
    max_prompt_tokens: int | None = None
    seed: int = 0

    def load(self, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """The prompts; all in the data's order, or a random choice of them.

        Raises:
            UserError: nothing is there, a column or a line is wrong, or the chats need a template
                that the tokenizer does not have.
        """
        _check_limit(self.limit)
        rows = self._rows()
        order = list(range(len(rows)))
        if self.limit is not None:
            random.Random(self.seed).shuffle(order)
        renders = self._renders(tokenizer)
        prompts: dict[str, Prompt] = {}
        too_long = 0
        for index in order:
            if self.limit is not None and len(prompts) >= self.limit:
                break
            prompt = self._prompt(rows[index], index, tokenizer, renders)
            if self.max_prompt_tokens is not None and len(prompt.ids) > self.max_prompt_tokens:
                too_long += 1
            else:
                prompts.setdefault(prompt.id, prompt)
        if too_long:
            warnings.warn(
                f"{too_long:,} prompts of {self.path} have more than {self.max_prompt_tokens} "
                "tokens and are left out",
                stacklevel=2,
            )
        if not prompts:
            raise UserError("no prompt is left", self.path, "raise prompts.max_prompt_tokens")
        return list(prompts.values())

    def _rows(self) -> Any:
        files = data_files(Path(self.path))
        try:
            with tempfile.TemporaryDirectory(prefix="draftsmith-") as cache:
                if files:
                    builder = BUILDERS[files[0].suffix]
                    rows = datasets.load_dataset(
                        builder,
                        data_files=[str(file) for file in files],
                        split="train",
                        cache_dir=cache,
                        keep_in_memory=True,
                    )
                else:
                    rows = datasets.load_dataset(self.path, self.name, split=self.split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            for file in files:
                _check_text(file)
            reason = str(_first_cause(error)).strip().splitlines()[0]
            raise UserError(
                f"cannot load the prompts: {reason}",
                self.path,
                "give prompts.path a local file, or a hub id that can be reached",
            ) from error
        wanted = [self.messages_column or self.prompt_column]
        others = (self.reference_column, self.material_column, self.category_column)
        wanted += [column for column in others if column]
        for column in wanted:
            if column not in rows.column_names:
                raise UserError(
                    f"there is no column {column!r}", self.path, _nearest(column, rows.column_names)
                )
        return rows

    def _renders(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        has_template = bool(tokenizer.chat_template)
        needs_template = self.messages_column or self.chat_template is ChatTemplate.always
        if needs_template and not has_template:
            raise UserError(
                "the prompts are chats, but the target's tokenizer has no chat template",
                self.path,
                "use a chat model as target, or prompts.chat_template=never with a text column",
            )
        return bool(self.messages_column) or (
            has_template and self.chat_template is not ChatTemplate.never
        )

    def _prompt(
        self, row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase, renders: bool
    ) -> Prompt:
        source = f"{Path(self.path).name}:{index + 1}"
        column = self.messages_column or self.prompt_column
        value = row[column]
        if not value or not (self.messages_column or (isinstance(value, str) and value.strip())):
            raise UserError(
                f"row {index + 1} has no text in {column!r}", self.path, "remove or fill it"
            )
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if renders:
            messages = value if self.messages_column else [{"role": "user", "content": value}]
            # The template writes BOS itself where the model wants one.
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            ids = tokenizer(text, verbose=False)["input_ids"]
        reference = row[self.reference_column] if self.reference_column else None
        material = []
        if self.material_column and row[self.material_column]:
            material = tokenizer(
                row[self.material_column], add_special_tokens=False, verbose=False
            )["input_ids"]
        category = str(row[self.category_column]) if self.category_column else ""
        return Prompt(prompt_id(ids), list(ids), text, reference, source, material, category)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(
            f"prompts.limit={limit} leaves no prompt", hint="set at least 1, or null for all"
        )


def prompt_id(ids: Iterable[int]) -> str:
    """Short content hash of a prompt's ids."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def data_files(path: Path) -> list[Path]:
    """The local files that `path` means, checked; none where it can only be a hub id.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or a line of it is broken.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
        kinds = {file.suffix for file in found}
        if len({BUILDERS[kind] for kind in kinds}) != 1:
            raise UserError(
                f"the folder holds {'files of several kinds' if kinds else 'no data files'}",
                path,
                f"name one file, or a folder of one kind: {', '.join(BUILDERS)}",
            )
    elif path.exists():
        if path.suffix not in BUILDERS:
            raise UserError(
                f"files that end in {path.suffix!r} are not read",
                path,
                f"there are: {', '.join(BUILDERS)}",
            )
        found = [path]
    elif path.suffix in BUILDERS or path.is_absolute() or str(path).startswith("."):
        raise UserError("the prompt file does not exist", path, "check prompts.path")
    else:
        return []
    for file in found:
        if file.stat().st_size == 0 or (file.suffix != ".parquet" and not _has_text(file)):
            raise UserError("the prompt file is empty", file, "give a file with prompts")
        if file.suffix == ".jsonl":
            _check_lines(file)
    return found


def _has_text(file: Path) -> bool:
    with file.open(encoding="utf-8", errors="replace") as lines:
        return any(line.strip() for line in lines)


def _check_lines(file: Path) -> None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"line {number} is not JSON: {error}", file, "correct or remove the line"
                ) from error
            if not isinstance(value, dict):
                raise UserError(
                    f"line {number} is {type(value).__name__}, not an object",
                    file,
                    'write {"prompt": "..."} on every line',
                )


def _check_text(file: Path) -> None:
    """Raise a UserError that names the place, where a text file is not UTF-8 or not JSON."""
    if file.suffix == ".parquet":
        return
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(
            f"line {line} is not UTF-8 text", file, "save the file in UTF-8, or remove the line"
        ) from error
    if file.suffix == ".json":
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":  # values one after the other: an object on every line
                _check_lines(file)
                return
            raise UserError(
                f"line {error.lineno} is not JSON: {error}", file, "correct the file"
            ) from error


def _first_cause(error: BaseException) -> BaseException:
    """What the library met at first, below its own wrapping."""
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    return error


def _nearest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(names)}"
