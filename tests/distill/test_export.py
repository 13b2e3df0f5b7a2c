"""What training left is exported: language models as such, heads in their own form."""

import json
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from decode import SamplingParams, Target, tokenizer_hash
from decode.drafters import load_drafter
from decode.models import Blockwise, Hydra, Medusa, ScratchLM, load_heads, save_heads
from distill.errors import UserError
from distill.evaluate import Evaluate
from distill.export import Export
from distill.prompts import Prompt
from distill.target import EMBEDDED, Dtype, TargetSettings, fingerprint


@dataclass(frozen=True)
class Few:
    """Prompts of a few ids."""

    def load(self, tokenizer):
        return [Prompt(str(n), [5 + n, 7, 9], "", None, "test") for n in range(4)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=64, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(target, tmp_path, request):
    """A folder as `draftsmith train` leaves it."""
    model = AutoModelForCausalLM.from_pretrained(target)
    folder = tmp_path / "run" / "drafter"
    save_heads(request.param.build(model), folder)
    description = {
        "family": request.param.family,
        "target": str(target),
        "target_fingerprint": fingerprint(model),
        "tokenizer_hash": tokenizer_hash(AutoTokenizer.from_pretrained(target)),
    }
    (folder / "draftsmith.json").write_text(json.dumps(description))
    return folder.parent


EACH = pytest.mark.parametrize(
    "trained", [Medusa(num_heads=2), Hydra(num_heads=2), Blockwise(num_heads=2)],
    ids=["medusa", "hydra", "blockwise"], indirect=True,
)  # fmt: skip


@EACH
def test_heads_are_exported_and_evaluated(trained, target, tmp_path, capsys):
    settings = TargetSettings(path=str(target))
    output = tmp_path / "exported"
    Export(checkpoint=trained, target=settings, prompts=Few(), output=output).run()
    assert "weights equal after reload" in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "draftsmith.json", "README.md"} <= names
    model = AutoModelForCausalLM.from_pretrained(target)
    before = load_heads(trained / "drafter", model).state_dict()
    after = load_heads(output, model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    description = json.loads((output / "draftsmith.json").read_text())
    assert description["export"]["parameters"] == sum(tensor.numel() for tensor in before.values())
    card = (output / "README.md").read_text()
    assert f"Decoding heads ({description['family']})" in card
    assert "assistant_model" not in card

    with pytest.raises(UserError, match="there is a model already"):
        Export(checkpoint=trained, target=settings, prompts=Few(), output=output).run()
    Evaluate(
        target=settings,
        drafters={"heads": str(output)},
        prompts=Few(),
        sampling=SamplingParams(max_new_tokens=8, ignore_eos=True),
        draft_length=2,
        output=tmp_path / "report",
        compare_transformers=False,
        certify=True,
    ).run()
    assert (tmp_path / "report" / "results.json").is_file()


def test_a_language_model_is_exported_as_one(target, tmp_path):
    settings = TargetSettings(path=str(target))
    source, output = tmp_path / "source", tmp_path / "exported"
    model = ScratchLM(num_layers=1, hidden_size=16).build(
        AutoModelForCausalLM.from_pretrained(target)
    )
    model.save_pretrained(source)
    Export(checkpoint=source, target=settings, prompts=Few(), output=output).run()
    exported = AutoModelForCausalLM.from_pretrained(output)
    assert all(map(torch.equal, exported.parameters(), model.parameters()))
    description = json.loads((output / "draftsmith.json").read_text())
    assert description["export"]["parameters"] == model.num_parameters()
    assert "assistant_model" in (output / "README.md").read_text()
    (source / "draftsmith.json").write_text(json.dumps({"family": "eagle"}))
    with pytest.raises(UserError, match="family 'eagle' are not known"):
        Export(checkpoint=source, target=settings, output=tmp_path / "other").run()


@pytest.mark.parametrize("trained", [Medusa(num_heads=2)], indirect=True)
def test_half_precision_heads_draft(trained, target, tmp_path):
    settings = TargetSettings(path=str(target))
    output = tmp_path / "half"
    half = Dtype.bfloat16
    Export(checkpoint=trained, target=settings, prompts=Few(), output=output, dtype=half).run()
    assert json.loads((output / "draftsmith.json").read_text())["export"]["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(target)
    load_drafter(output, target=Target(model), draft=2)
