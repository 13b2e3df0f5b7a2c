"""Prompts from files and from the standard library; bad input in one sentence."""

import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.errors import UserError
from distill.prompts import ChatTemplate, DatasetPrompts, StandardLibraryPrompts
from distill.standard_library import SPLITS, modules, pieces, split_of, split_source

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<unk>", "user", "assistant", "one", "two", "three", "def", "f", "return"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> list[list[int]]:
    prompts = DatasetPrompts(path=str(path), **settings).load(tokenizer)  # type: ignore[arg-type]
    return [prompt.ids for prompt in prompts]


def test_every_kind_of_file_gives_the_same_prompts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, object]] = [{"prompt": "one two"}, {"prompt": "three"}]
    expected = [[0, 4, 5], [0, 6]]
    assert load(write(tmp_path / "a.jsonl", rows), tokenizer) == expected
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert load(tmp_path / "b.json", tokenizer) == expected
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "c.parquet"))
    assert load(tmp_path / "c.parquet", tokenizer) == expected
    (tmp_path / "d.txt").write_text("one two\nthree\n")
    assert load(tmp_path / "d.txt", tokenizer, prompt_column="text") == expected


def test_columns_references_and_repeated_prompts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, object]] = [
        {"question": "one", "answer": "two"},
        {"question": "one", "answer": "three"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    settings = DatasetPrompts(path=str(path), prompt_column="question", reference_column="answer")
    (prompt,) = settings.load(tokenizer)
    assert (prompt.text, prompt.reference, prompt.source) == ("one", "two", "a.jsonl:1")
    assert prompt.material == []
    settings = DatasetPrompts(path=str(path), prompt_column="question", material_column="answer")
    (prompt,) = settings.load(tokenizer)
    assert prompt.material == tokenizer.convert_tokens_to_ids(["two"])
    with pytest.raises(UserError, match="no column 'answers'"):
        load(path, tokenizer, prompt_column="question", material_column="answers")


def test_a_smaller_limit_is_a_part_of_a_larger_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    words = ["one", "two", "three", "def", "f", "return"]
    path = write(tmp_path / "a.jsonl", [{"prompt": word} for word in words])
    assert load(path, tokenizer, limit=4)[:2] == load(path, tokenizer, limit=2)


def test_a_chat_is_rendered_with_one_bos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = TEMPLATE
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    assert load(path, tokenizer) == [[0, 2, 4, 3]]
    assert load(path, tokenizer, chat_template=ChatTemplate.never) == [[0, 4]]
    chats = [{"chat": [{"role": "user", "content": "two"}]}]
    path = write(tmp_path / "b.jsonl", chats)  # type: ignore[arg-type]
    assert load(path, tokenizer, messages_column="chat") == [[0, 2, 5, 3]]


def broken_on_line_17(folder: Path) -> Path:
    path = write(folder / "a.jsonl", [{"prompt": "one"}] * 16)
    path.write_text(path.read_text() + '{"prompt": \n')
    return path


@pytest.mark.parametrize(
    ("make", "settings", "sentence"),
    [
        (lambda f: f / "no.jsonl", {}, "does not exist"),
        (lambda f: write(f / "a.jsonl", []), {}, "is empty"),
        (broken_on_line_17, {}, "line 17 is not JSON"),
        (lambda f: write(f / "a.jsonl", [{"prompts": "one"}]), {}, "did you mean 'prompts'"),
        (lambda f: write(f / "a.jsonl", [{"prompt": " "}]), {}, "row 1 has no text"),
        (lambda f: write(f / "a.yaml", [{"prompt": "one"}]), {}, "are not read"),
        (
            lambda f: write(f / "a.jsonl", [{"prompt": "one"}]),
            {"chat_template": ChatTemplate.always},
            "no chat template",
        ),
    ],
)
def test_bad_input_is_said_in_one_sentence(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    make: object,
    settings: dict[str, object],
    sentence: str,
) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        load(make(tmp_path), tokenizer, **settings)  # type: ignore[operator]
    assert "\n" not in str(raised.value)


def test_prompts_over_the_limit_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "one"}, {"prompt": "one two three"}])
    with pytest.warns(UserWarning, match="1 prompts .* more than 2 tokens"):
        assert load(path, tokenizer, max_prompt_tokens=2) == [[0, 4]]


def test_modules_belong_to_one_split_and_statements_are_never_cut() -> None:
    names = [name for name, _ in modules()]
    assert {split_of(name) for name in names} == set(SPLITS)
    assert split_of("json.decoder") == split_of("json.decoder")
    functions = [f"def f{i}():\n    return '{'x' * 500}'\n" for i in range(7)]
    texts = split_source("\n".join(functions))
    assert len(texts) == 3
    assert all(text.startswith("def f") for text in texts)
    assert "".join(texts).replace("\n", "") == "".join(functions).replace("\n", "")


def test_a_prompt_and_its_reference_are_the_piece(tmp_path: Path) -> None:
    root = tmp_path
    name = next(f"m{i}" for i in range(1000) if split_of(f"m{i}") == "evaluate")
    source = "".join(f"def f{i}():\n    return {i}\n\n\n" for i in range(80))
    (root / f"{name}.py").write_text(source)
    found = list(pieces("evaluate", root))
    assert [piece.module for piece in found] == [name] * len(found)
    assert not list(pieces("target", root))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff\n", "line 2 is not UTF-8"),
        ("a.csv", b"prompt\none\n\xff\n", "line 3 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "one"}\n{"prompt": "\xff"}\n', "line 2 is not JSON"),
        ("a.json", b'[{"prompt": "one"},\n {"prompt": "two",,}]\n', "line 2 is not JSON"),
        ("a.json", b'{"prompt": "one"}\n{"prompt": two}\n', "line 2 is not JSON"),
    ],
)
def test_what_is_broken_in_a_file_is_said_with_its_line(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{message}.*\({tmp_path / name}\)"):
        load(tmp_path / name, tokenizer)


@pytest.mark.parametrize("source", [DatasetPrompts, StandardLibraryPrompts])
def test_a_limit_below_one_is_said(
    source: type, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = {"path": str(write(tmp_path / "a.jsonl", [{"prompt": "one"}]))}
    settings = path if source is DatasetPrompts else {}
    with pytest.raises(UserError, match=r"prompts\.limit=0 leaves no prompt; set at least 1"):
        source(**settings, limit=0).load(tokenizer)


def test_an_unknown_split_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no split 'train'"):
        StandardLibraryPrompts(split="train").load(tokenizer)


def test_only_whole_lines_become_a_prompt_and_the_rest_its_reference(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompts = StandardLibraryPrompts(split="evaluate", limit=6, prompt_tokens=24).load(tokenizer)
    texts = {f"{piece.module}:{piece.index}": piece.text for piece in pieces("evaluate")}
    assert len({prompt.id for prompt in prompts}) == 6
    for prompt in prompts:
        assert prompt.reference is not None
        assert prompt.text + prompt.reference == texts[prompt.source]
        assert prompt.reference.startswith("\n")
        assert len(prompt.ids) <= 24
    smaller = StandardLibraryPrompts(split="evaluate", limit=3, prompt_tokens=24).load(tokenizer)
    assert smaller == prompts[:3]


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.jsonl": '{"prompt": "one"}', "b.txt": "two"}, "files of several kinds"),
        ({"notes.md": "one"}, "no data files"),
        ({"a.jsonl": '{"prompt": "one"}\n', "b.jsonl": "\n \n"}, r"is empty \(.*b\.jsonl"),
        ({"a.jsonl": '{"prompt": "one"}\n[1]\n'}, "line 2 is list, not an object"),
        ({"a.csv": "prompts\none\n"}, "did you mean 'prompts'"),
    ],
)
def test_a_folder_is_one_kind_of_data(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, files: dict[str, str], sentence: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, tokenizer)


def test_a_folder_of_one_kind_is_read_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "one"}])
    write(tmp_path / "b.jsonl", [{"prompt": "two"}, {"prompt": "one"}])
    assert load(tmp_path, tokenizer) == [[0, 4], [0, 5]]


def test_chats_without_a_template_and_empty_chats_are_said(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", [{"chat": [{"role": "user", "content": "one"}]}])
    with pytest.raises(UserError, match="has no chat template"):
        load(path, tokenizer, messages_column="chat")
    tokenizer.chat_template = TEMPLATE
    rows = [{"chat": [{"role": "user", "content": "one"}]}, {"chat": []}]
    with pytest.raises(UserError, match="row 2 has no text in 'chat'"):
        load(write(path, rows), tokenizer, messages_column="chat")  # type: ignore[arg-type]


def test_a_hub_that_cannot_be_reached_is_said(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"no route to the hub \(some/data\); .* local file"):
        DatasetPrompts(path="some/data").load(tokenizer)
