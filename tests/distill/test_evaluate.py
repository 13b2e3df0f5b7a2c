"""A small evaluation, whole, cut short, and gone on with."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decode import SamplingParams
from decode.acceptance import TopTokens
from decode.drafters import ExpansionTrees, PromptLookup, Rest, SuffixDrafts, TokenRecycling
from decode.int8.tiles import is_available as int8_is_available
from distill.batches import SeqKD
from distill.drafter_folder import find_drafter
from distill.errors import UserError
from distill.evaluate import Evaluate
from distill.measure import read_journal
from distill.prompts import DatasetPrompts
from distill.report.html import marks, token_texts
from distill.store import Row, RowStore
from distill.target import Quantization, TargetSettings


def save_model(folder: Path, noise: float) -> Path:
    words = {f"w{i}": i for i in range(50)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w1", eos_token="w2")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.4,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_model(root / "target", 0.0)
    save_model(root / "good", 0.02)
    save_model(root / "bad", 1.0)
    prompts = [{"prompt": " ".join(f"w{(i * 7 + j) % 50}" for j in range(4))} for i in range(5)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return root


def evaluation(folders: Path, output: Path, **changes: object) -> Evaluate:
    settings: dict[str, object] = {
        "target": TargetSettings(path=str(folders / "target")),
        "drafters": {name: str(folders / name) for name in ("bad", "good")},
        "prompts": DatasetPrompts(path=str(folders / "prompts.jsonl")),
        "sampling": SamplingParams(max_new_tokens=20, ignore_eos=True),
        "draft_length": 3,
        "num_resamples": 200,
        "output": output,
    }
    return Evaluate(**(settings | changes))  # type: ignore[arg-type]


def test_an_evaluation_gives_figures_and_is_not_done_twice(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluation(folders, tmp_path).run()
    results = json.loads((tmp_path / "results.json").read_text())
    good, bad = results["drafters"]["good"], results["drafters"]["bad"]
    assert good["block_efficiency"]["value"] > 1.5 > bad["block_efficiency"]["value"] >= 1.0
    assert good["verdict" if "verdict" in good else "mismatches"] == 0
    assert results["exactness"] == "greedy-identical"
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "acceptance_by_position.png",
        "block_efficiency.png",
        "time_split.png",
    }
    before = report.read_text()
    capsys.readouterr()
    evaluation(folders, tmp_path).run()
    assert "is finished" in capsys.readouterr().out
    assert report.read_text() == before
    with pytest.raises(UserError, match="draft_length"):
        evaluation(folders, tmp_path, draft_length=2).run()


def test_a_killed_evaluation_goes_on_where_it_was(folders: Path, tmp_path: Path) -> None:
    evaluation(folders, tmp_path / "whole").run()
    lines = (tmp_path / "whole" / "measurements.jsonl").read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "measurements.jsonl").write_text("".join(lines[:7]) + lines[7][:30])
    evaluation(folders, cut).run()
    done = read_journal(cut / "measurements.jsonl")
    whole = read_journal(tmp_path / "whole" / "measurements.jsonl")
    assert [(m.unit, m.mode, m.outputs) for m in done] == [
        (m.unit, m.mode, m.outputs) for m in whole
    ]


def test_drafting_without_a_model_learns_in_order_also_after_a_kill(
    folders: Path, tmp_path: Path
) -> None:
    def without_model(output: Path) -> Evaluate:
        free = {
            "suffix": SuffixDrafts(),
            "lookup": PromptLookup(),
            "recycling": TokenRecycling(),
        }
        return evaluation(folders, output, drafters={}, model_free=free, repeats=2, certify=True)

    without_model(tmp_path / "whole").run()
    results = json.loads((tmp_path / "whole" / "results.json").read_text())["drafters"]
    assert list(results) == ["suffix", "lookup", "recycling"]
    whole = read_journal(tmp_path / "whole" / "measurements.jsonl")
    steps = {(m.unit, m.mode, m.repeat): m.outputs[0].steps for m in whole}
    # What was learnt before measuring, or in the first timing, does not count in the second.
    assert all(steps[unit, mode, 0] == steps[unit, mode, 1] for unit, mode, _ in steps)
    lines = (tmp_path / "whole" / "measurements.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "measurements.jsonl").write_text("".join(lines[:13]))
    without_model(tmp_path / "cut").run()
    again = read_journal(tmp_path / "cut" / "measurements.jsonl")
    assert {(m.unit, m.mode, m.repeat): m.outputs[0].steps for m in again} == steps


def test_a_warm_start_is_what_every_repeat_begins_with_also_after_a_kill(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The past holds what the target writes, as rows of other prompts with the same outputs."""
    evaluation(folders, tmp_path / "cold", model_free={"suffix": SuffixDrafts()}).run()
    cold = read_journal(tmp_path / "cold" / "measurements.jsonl")
    written = {m.unit: m.outputs[0] for m in cold if m.mode == "suffix"}

    def rows(prompt_of_unit: dict[int, list[int]]) -> list[Row]:
        return [
            Row(f"key {prompt}", "", "", prompt, written[unit].tokens, "length")
            for unit, prompt in prompt_of_unit.items()
        ]

    store = RowStore(tmp_path / "rows")
    store.append(rows({unit: [unit] for unit in written}))

    def warm(output: Path) -> Evaluate:
        free = {"suffix": SuffixDrafts(), "rest": Rest(), "lookup": PromptLookup()}
        past = SeqKD(rows=store.folder)
        return evaluation(folders, output, drafters={}, model_free=free, past=past, repeats=2)

    warm(tmp_path / "whole").run()
    whole = read_journal(tmp_path / "whole" / "measurements.jsonl")
    steps = {(m.unit, m.mode, m.repeat): m.outputs[0].steps for m in whole}
    assert all(steps[unit, mode, 0] == steps[unit, mode, 1] for unit, mode, _ in steps)
    assert len(steps[0, "suffix", 0]) < len(written[0].steps)  # the first prompt finds its output
    assert len(steps[0, "rest", 0]) < len(steps[0, "autoregressive", 0])
    lines = (tmp_path / "whole" / "measurements.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "measurements.jsonl").write_text("".join(lines[:17]))
    warm(tmp_path / "cut").run()
    again = read_journal(tmp_path / "cut" / "measurements.jsonl")
    assert {(m.unit, m.mode, m.repeat): m.outputs[0].steps for m in again} == steps

    free, past = {"lookup": PromptLookup()}, SeqKD(rows=store.folder)
    useless = evaluation(folders, tmp_path / "no", drafters={}, model_free=free, past=past)
    with pytest.raises(UserError, match="no drafter learns"):
        useless.run()
    prompt = json.loads((folders / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    evaluated = [int(word[1:]) for word in prompt.split()]
    store.append(rows({0: evaluated}))
    with pytest.raises(UserError, match="past_hash"):
        warm(tmp_path / "whole").run()
    warm(tmp_path / "more").run()
    assert "1 past outputs are left out" in capsys.readouterr().out
    more = read_journal(tmp_path / "more" / "measurements.jsonl")
    assert {(m.unit, m.mode, m.repeat): m.outputs[0].steps for m in more} == steps


def test_drafters_need_names_of_their_own(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no drafter to evaluate"):
        evaluation(folders, tmp_path, drafters={}).run()
    with pytest.raises(UserError, match="two drafters are called 'good'"):
        evaluation(folders, tmp_path, model_free={"good": PromptLookup()}).run()
    with pytest.raises(UserError, match="cannot be called 'autoregressive'"):
        evaluation(folders, tmp_path, model_free={"autoregressive": PromptLookup()}).run()
    with pytest.raises(UserError, match="max_tree_depth"):
        evaluation(folders, tmp_path, model_free={"mine": SuffixDrafts(depth=0)}).run()


def test_sampling_and_batches(folders: Path, tmp_path: Path) -> None:
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, ignore_eos=True)
    evaluation(folders, tmp_path, sampling=sampling, batch_size=2).run()
    good = json.loads((tmp_path / "results.json").read_text())["drafters"]["good"]
    assert good["mismatches"] is None
    assert 0 < good["expected_alpha"]["value"] <= 1
    assert good["speedup_over_transformers"] is None


def test_a_drafter_that_cannot_be_used_is_said(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="half-written"):
        find_drafter(tmp_path / "half")
    with pytest.raises(UserError, match="there is no drafter"):
        find_drafter(tmp_path / "none")
    other = save_model(tmp_path / "other", 0.02)
    (other / "draftsmith.json").write_text(
        json.dumps({"family": "lm", "target": "llama", "target_fingerprint": "another"})
    )
    with pytest.raises(UserError, match="aligned to the target llama"):
        evaluation(folders, tmp_path / "run", drafters={"other": str(other)}).run()


def test_a_certificate_is_given_when_asked_for(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(folders, tmp_path, certify=True).run()
    found = json.loads((tmp_path / "certificate.json").read_text())
    assert found.keys() == {"good", "bad"}
    assert found["good"] == {
        "num_outputs": 5,
        "num_tokens": 100,
        "mismatches": [],
        "reference": "transformers' own",
    }
    assert "all are transformers' own, token for token" in capsys.readouterr().out


@pytest.mark.skipif(not int8_is_available(), reason="needs AVX512-VNNI")
def test_a_target_in_int8_is_what_is_kept_to_and_the_report_says_so(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = TargetSettings(path=str(folders / "target"), quantization=Quantization.int8)
    report = evaluation(folders, tmp_path, target=target, certify=True).run()
    said = "greedy-identical is relative to the target in int8"
    assert said in capsys.readouterr().out
    assert "greedy-identical, relative to the target in int8" in report.read_text()
    for certificate in json.loads((tmp_path / "certificate.json").read_text()).values():
        assert certificate["mismatches"] == []
        assert certificate["reference"] == "the int8 target's own without drafts"


def test_only_an_evaluation_takes_a_quantised_target() -> None:
    with pytest.raises(UserError, match=r"target.quantization=int8 is for evaluate"):
        TargetSettings(quantization=Quantization.int8).load()


def test_compiled_forwards_are_taken_and_the_output_is_the_same(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(1) or function)
    target = TargetSettings(path=str(folders / "target"), compile=True)
    evaluation(folders, tmp_path, target=target, certify=True).run()
    assert len(compiled) == 6  # the target and two drafters, each for one token and for several
    for certificate in json.loads((tmp_path / "certificate.json").read_text()).values():
        assert certificate["mismatches"] == []
    assert capsys.readouterr().err.count("Compiled the forward of LlamaForCausalLM") == 6


def test_what_cannot_be_compiled_is_refused(folders: Path, tmp_path: Path) -> None:
    path = str(folders / "target")
    both = TargetSettings(path=path, quantization=Quantization.int8, compile=True)
    with pytest.raises(UserError, match=r"target.quantization=int8 has kernels of its own"):
        evaluation(folders, tmp_path / "int8", target=both).run()
    target = TargetSettings(path=path, compile=True)
    with pytest.raises(UserError, match=r"decoded one by one, and batch_size=2"):
        evaluation(folders, tmp_path / "batch", target=target, batch_size=2).run()
    with pytest.raises(UserError, match=r"target.compile=true is for evaluate"):
        target.load()


def test_trees_and_other_rules_are_chosen_by_settings(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = ExpansionTrees(counts=(3, 2))
    evaluation(folders, tmp_path / "tree", draft=tree).run()
    found = json.loads((tmp_path / "tree" / "results.json").read_text())
    assert found["drafters"]["bad"]["mismatches"] == 0
    assert "ExpansionTrees" in (tmp_path / "tree" / "report.html").read_text()
    for measurement in read_journal(tmp_path / "tree" / "measurements.jsonl"):
        if measurement.mode == "good":
            (output,) = measurement.outputs
            kinds = [mark.kind for mark in marks(output)]
            assert kinds.count("b") == sum(
                leaf for _, taken, emitted, leaf in output.steps if emitted > taken
            )
    lossy = TopTokens(top=10)
    evaluation(folders, tmp_path / "lossy", acceptance=lossy).run()
    assert "Lossy: " in capsys.readouterr().out
    found = json.loads((tmp_path / "lossy" / "results.json").read_text())
    assert found["exactness"] == "approximate"


def test_a_trace_keeps_every_step_and_the_page_draws_it(folders: Path, tmp_path: Path) -> None:
    report = evaluation(folders, tmp_path, draft=ExpansionTrees(counts=(2, 1)), trace=True).run()
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for measurement in read_journal(tmp_path / "measurements.jsonl"):
        if measurement.mode not in ("good", "bad"):
            continue
        (output,) = measurement.outputs
        steps = [
            record
            for record in records
            if (record["drafter"], record["request_id"]) == (measurement.mode, output.prompt_id)
        ]
        assert [record["step"] for record in steps] == list(range(2, len(output.steps) + 1))
        assert [token for record in steps for token in record["emitted"]] == output.tokens[1:]
        for record, (drafted, accepted, emitted, _) in zip(steps, output.steps[1:], strict=True):
            assert len(record["tokens"]) == len(record["parents"]) == drafted + 1
            assert len(record["path"]) == accepted
            assert len(record["emitted"]) == emitted
            taken = [record["tokens"][node] for node in record["path"]]
            assert record["emitted"][:accepted] == taken
            assert record["seconds"].keys() == {"draft", "verify", "other"}
    assert report.read_text().count("<svg") > 20
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["block_efficiency_by_length"].keys() == {"good", "bad"}
    assert results.keys() == {
        "drafters",
        "block_efficiency_by_length",
        "block_efficiency_by_category",
        "predicted_speed",
        "exactness",
        "num_prompts",
        "settings",
        "target_fingerprint",
        "environment",
    }


def test_texts_of_tokens_add_up(folders: Path) -> None:
    target = TargetSettings(path=str(folders / "target")).load()
    tokens = [5, 6, 7]
    assert "".join(token_texts(target, tokens)) == target.tokenizer.decode(tokens)


def test_every_token_of_a_real_output_has_one_colour(folders: Path, tmp_path: Path) -> None:
    evaluation(folders, tmp_path).run()
    for measurement in read_journal(tmp_path / "measurements.jsonl"):
        if measurement.mode in ("good", "bad"):
            (output,) = measurement.outputs
            kinds = [mark.kind for mark in marks(output)]
            assert len(kinds) == len(output.tokens) == 20
            accepted = measurement.counts["num_accepted_tokens"]
            assert kinds.count("a") == accepted
            own = sum(emitted > taken for _, taken, emitted, _ in output.steps)
            assert kinds.count("r") + kinds.count("b") == own


def test_too_few_prompts_and_other_weights_are_refused(folders: Path, tmp_path: Path) -> None:
    long = SamplingParams(max_new_tokens=61, ignore_eos=True)  # 4 + 61 > 64
    with pytest.raises(UserError, match="0 prompts fit the context"):
        evaluation(folders, tmp_path / "long", sampling=long).run()
    with pytest.raises(UserError, match="two such units"):
        evaluation(folders, tmp_path / "one", batch_size=5).run()
    drafter = save_model(tmp_path / "drafter", 0.02)
    evaluation(folders, tmp_path / "run", drafters={"mine": str(drafter)}).run()
    save_model(drafter, 0.03)
    with pytest.raises(UserError, match=r"weights\.mine"):
        evaluation(folders, tmp_path / "run", drafters={"mine": str(drafter)}).run()


def test_transformers_goes_past_eos_where_we_do(folders: Path, tmp_path: Path) -> None:
    evaluation(folders, tmp_path / "first").run()
    (first, *_) = read_journal(tmp_path / "first" / "measurements.jsonl")
    target = save_model(tmp_path / "target", 0.0)
    config = json.loads((target / "generation_config.json").read_text())
    config["eos_token_id"] = first.outputs[0].tokens[4]  # from here on every output may hold it
    (target / "generation_config.json").write_text(json.dumps(config))
    settings = TargetSettings(path=str(target))
    evaluation(folders, tmp_path / "second", target=settings).run()
    found = read_journal(tmp_path / "second" / "measurements.jsonl")
    assert "transformers" in {m.mode for m in found}
    assert {len(output.tokens) for m in found for output in m.outputs} == {20}
