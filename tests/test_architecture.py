"""Dependencies run one way: commands, then their parts, then the runtime's public names."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLIC = {"decode", "decode.acceptance", "decode.drafters", "decode.models", "decode.suffix"}
NOT_FOR_DECODE = {
    "accelerate", "datasets", "distill", "hydra", "omegaconf", "peft", "tensorboard", "wandb",
}  # fmt: skip
COMMANDS = {"generate", "train", "export", "evaluate", "compare", "pipeline", "inspect_rows", "cli"}


def imports(folder: str) -> Iterator[tuple[str, str, list[str]]]:
    """(file, module, names) for every import in a package, those inside functions included."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((file, alias.name, []) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                yield file, node.module or "", [alias.name for alias in node.names]


def test_the_runtime_knows_nothing_of_training_files_or_hydra() -> None:
    found = [(f, m) for f, m, _ in imports("decode") if m.split(".")[0] in NOT_FOR_DECODE]
    assert not found


def test_distill_uses_only_the_public_names_of_decode() -> None:
    ours = [(f, m, names) for f, m, names in imports("distill") if m.split(".")[0] == "decode"]
    assert not [(f, m) for f, m, _ in ours if m not in PUBLIC]
    assert not [(f, m, n) for f, m, names in ours for n in names if n.startswith("_")]


def test_a_rule_knows_no_model_and_a_drafter_no_decoder() -> None:
    inside = [(f, m) for f, m, _ in imports("decode") if m.startswith("decode.")]
    models = ("decode.target", "decode.cache", "decode.models", "decode.drafters", "decode.decoder")
    assert not [(f, m) for f, m in inside if "/acceptance/" in f and m.startswith(models)]
    assert not [(f, m) for f, m in inside if "/drafters/" in f and m == "decode.decoder"]


def test_parts_never_import_a_command() -> None:
    commands = {f"distill.{name}" for name in COMMANDS}
    found = [
        (f, m) for f, m, _ in imports("distill") if m in commands and Path(f).stem not in COMMANDS
    ]
    assert not found


def test_only_config_and_its_words_know_hydra() -> None:
    found = {f for f, m, _ in imports("distill") if m.split(".")[0] in ("hydra", "omegaconf")}
    assert found <= {"distill/config.py", "distill/explain.py"}
