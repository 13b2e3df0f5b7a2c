"""Language models whose head covers some ids: what they say, draft, and leave on disk."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from decode import CachedModel, Request, SamplingParams, SpeculativeDecoder, Target
from decode import lay_out_for_decoding as lay_out
from decode.drafters import LikeliestChildren, LMDrafter, LMTreeDrafter, load_drafter
from decode.models import TrimmedHead, load_lm, trim, trimmed_head
from decode.planner import TreePlan

KEPT = [3, 8, 10, 50, 51, 96]
TOKENS = torch.arange(0, 96, 4)[None]
ARCHITECTURES = pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])


def outside() -> torch.Tensor:
    return torch.tensor([i for i in range(97) if i not in KEPT])


@ARCHITECTURES
@pytest.mark.parametrize("is_tied", [False, True])
def test_it_says_of_the_kept_ids_what_the_model_says(tiny, name, is_tied):
    model = tiny(name, tie_word_embeddings=is_tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    smaller = trim(model, KEPT[::-1])  # in any order
    logits = smaller(TOKENS).logits
    torch.testing.assert_close(logits[..., KEPT], model(TOKENS).logits[..., KEPT])
    assert (logits[..., outside()] == -torch.inf).all()
    assert smaller.lm_head.weight.shape == (len(KEPT), 32)
    assert trimmed_head(smaller) is smaller.lm_head
    assert trimmed_head(model) is None
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


@ARCHITECTURES
@pytest.mark.parametrize("is_laid_out", [False, True])
def test_the_short_way_gives_the_same(tiny, name, is_laid_out):
    model = trim(tiny(name), KEPT)
    expected = model(TOKENS).logits
    if is_laid_out:
        lay_out(model)
        assert model.lm_head.weight.stride(0) == 1
    with torch.inference_mode():
        cached = CachedModel(model, num_slots=1)
        assert cached._lean is not None
        logits = cached.forward([0], TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_holds_it_and_says_so(tiny, tmp_path):
    model = trim(tiny("llama", tie_word_embeddings=True), KEPT)
    model.save_pretrained(tmp_path)
    again = load_lm(tmp_path)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert again.lm_head.ids.tolist() == KEPT
    half = load_lm(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.lm_head.ids.tolist() == KEPT
    with pytest.raises(RuntimeError, match="mismatched_sizes"):  # not a head drawn at random
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(load_lm(tmp_path / "twice")(TOKENS).logits, model(TOKENS).logits)


def test_a_whole_model_is_loaded_as_ever(tiny, tmp_path):
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    assert torch.equal(load_lm(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_half_written_one_is_refused(tiny, tmp_path, damage):
    trim(tiny("llama"), KEPT).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    with pytest.raises(ValueError, match="does not hold this trimmed model"):
        load_lm(tmp_path)
    with pytest.raises(ValueError, match="cannot load a drafter from"):
        load_drafter(tmp_path, target=Target(tiny("llama")), draft=2)


def test_what_cannot_be_trimmed_is_named(tiny):
    with pytest.raises(ValueError, match="head of GPT2LMHeadModel cannot be trimmed"):
        trim(tiny("gpt2"), KEPT)
    with pytest.raises(ValueError, match="only some ids already"):
        trim(trim(tiny("llama"), KEPT), KEPT)
    for ids in ([], [97], [-1]):
        with pytest.raises(ValueError, match="some of the model's 97"):
            trim(tiny("llama"), ids)


def test_building_leaves_the_global_draws_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    trim(tiny("llama"), KEPT)
    assert torch.rand(1) == expected


def test_a_node_has_no_more_children_than_there_are_ids(tiny, perturbed):
    model = tiny("llama")
    drafter, target = trim(perturbed(model), KEPT), Target(model)
    LMTreeDrafter(drafter, target=target, shape=LikeliestChildren(TreePlan.expansion([6])))
    with pytest.raises(ValueError, match="share 6 tokens"):
        LMTreeDrafter(drafter, target=target, shape=LikeliestChildren(TreePlan.expansion([7])))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_greedy_output_is_the_targets(tiny, perturbed, prompt, greedy, name):
    model = tiny(name)
    texts = [prompt(5 + seed) for seed in range(3)]
    expected = [greedy(model, text, 20) for text in texts]
    drafter = trim(perturbed(model), sorted({token for row in expected for token in row})[::2])
    target = Target(model, max_batch_size=2)
    decoder = SpeculativeDecoder(target, LMDrafter(drafter, target=target, draft_length=3))
    params = SamplingParams(max_new_tokens=20)
    results = decoder.generate(
        [Request(id=str(i), prompt=text, sampling=params) for i, text in enumerate(texts)]
    )
    assert [result.tokens for result in results] == expected
    accepted = sum(result.stats.num_accepted_tokens for result in results)
    assert accepted > 0  # it drafts what is kept, and is not only refused


def test_transformers_takes_it_for_an_assistant(tiny, perturbed, prompt, greedy):
    model, text = tiny("llama"), prompt(6)
    expected = greedy(model, text, 20)
    ids = torch.tensor([text])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        assistant_model=trim(perturbed(model), sorted(set(expected))[::2]),
    )
    assert output[0, len(text) :].tolist() == expected


def test_a_folder_drafts_in_a_new_process(tiny, perturbed, tokenizer, prompt, greedy, tmp_path):
    model = tiny("llama")
    expected = greedy(model, prompt(5), 20)
    model.save_pretrained(tmp_path / "target")
    trim(perturbed(model), expected[:10]).save_pretrained(tmp_path / "drafter")
    script = f"""
import torch
from transformers import AutoModelForCausalLM
from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import load_drafter
target = Target(AutoModelForCausalLM.from_pretrained({str(tmp_path / "target")!r}))
drafter = load_drafter({str(tmp_path / "drafter")!r}, target=target, draft=3)
request = Request(id="0", prompt={prompt(5)}, sampling=SamplingParams(max_new_tokens=20))
(result,) = SpeculativeDecoder(target, drafter).generate([request])
print(*result.tokens, result.stats.num_accepted_tokens)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    *tokens, accepted = map(int, done.stdout.split())
    assert tokens == expected
    assert accepted > 0


def test_the_head_is_a_module_of_its_own():
    head = TrimmedHead(4, 2, 5)
    head.ids.copy_(torch.tensor([1, 4]))
    hidden = torch.randn(3, 4)
    logits = head(hidden)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits[:, [1, 4]], hidden @ head.weight.T)
    logits[:, [1, 4]].sum().backward()
    assert head.weight.grad is not None
