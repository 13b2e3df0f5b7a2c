"""Compiled forwards give what uncompiled ones give, or are not taken; torch's compiler is mostly
left out here, for it takes ten seconds a forward."""

import copy
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import decode.compiled_forward
from decode import Draft, Request, SamplingParams, SpeculativeDecoder, Target, lay_out_for_decoding
from decode.acceptance import SpeculativeSampling
from decode.cached_model import CachedModel
from decode.compiled_forward import Inputs, compiled, keep_compiled_code, padded, rounded_up
from decode.drafters import LMDrafter
from decode.drafters.drafting import ExpansionTrees

LENGTHS = [1, 7, 20]
NEW_TOKENS = 24
ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]


def counting(compile_):
    """A stand-in for `torch.compile`, and the widths that what it gave was called with."""
    widths = []

    def stand_in(function, **options):
        run = compile_(function, **options)

        def counted(*inputs):
            widths.append(inputs[0].shape[1])
            return run(*inputs)

        return counted

    return stand_in, widths


@pytest.fixture
def counted(monkeypatch):
    """Nothing is compiled; the list is of the widths that went where it would be."""
    stand_in, widths = counting(lambda function, **options: function)
    monkeypatch.setattr(torch, "compile", stand_in)
    return widths


@pytest.fixture
def traced(monkeypatch):
    """Forwards are traced, which takes seconds, and the traces run as they are; widths likewise."""
    stand_in, widths = counting(functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", stand_in)
    return widths


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(90, shape, generator=torch.Generator().manual_seed(sum(shape)))


def decoded(target, drafter, prompts, **sampling) -> list[list[int]]:
    decoder = SpeculativeDecoder(target, drafter, SpeculativeSampling())
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, **sampling)
    requests = [Request(id=str(n), prompt=ids, sampling=params) for n, ids in enumerate(prompts)]
    return [result.tokens for result in decoder.generate(requests)]


def both(model, **options) -> tuple[CachedModel, CachedModel]:
    """Compiled and not."""
    return CachedModel(model, compiles=True, **options), CachedModel(model, **options)


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES[1:])]
)
@torch.no_grad()
def test_any_width_at_any_length_goes_through_two_compiled_forwards(tiny, traced, architecture):
    model = copy.deepcopy(tiny(architecture))
    lay_out_for_decoding(model)
    fast, plain = both(model, num_slots=3, max_length=64)
    assert set(fast._compiled._variants) == {(True, ()), (False, ())}
    tree = Draft.from_lists([1], [[4, 5, 6, 7]], [[0, 0, 1, 2]])
    outputs = []
    for cached in (fast, plain):
        found = []
        for slot, length in ((2, 20), (0, 3)):
            cached.forward([slot], tokens(1, length), keep=[], commit=[length])
            for width in (1, 2, 5, 30):
                found.append(cached.forward([slot], tokens(1, width)).logits)
            found.append(cached.forward([slot], tree.tokens, tree=tree).logits)
        outputs.append(found)
    # At the start each is tried, then run; prompts are not compiled.
    assert traced == [1, 1, 7, 7, *[1, 2, 5, 30, 5] * 2]
    assert set(fast._compiled._variants) == {(True, ()), (False, ())}
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_states_of_layers_are_compiled_when_first_asked_for(tiny, counted):
    fast, plain = both(tiny("llama"), num_slots=1, max_length=64)
    for cached in (fast, plain):
        cached.forward([0], tokens(1, 9), keep=[], commit=[9])
    ours, theirs = (cached.forward([0], tokens(1, 3), layers=(0, 2)) for cached in (fast, plain))
    assert ((False, (0, 2))) in fast._compiled._variants
    for layer in (0, 2):
        torch.testing.assert_close(ours.hidden[layer], theirs.hidden[layer], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_models_of_one_family_are_not_taken_for_each_other(traced):
    """What torch compiles it keeps with the code it came from, which is the same for both."""

    def times(factor: int):
        return lambda tokens, masks, positions, cache, layers: (tokens * factor, {})

    one = torch.ones(1, 1)
    inputs = Inputs(one, one, one, torch.zeros(1, 1, 1, 5), [], [])
    products = [compiled(times(factor), ())(inputs)[0].item() for factor in (2, 3)]
    assert products == [2, 3]


@torch.no_grad()
def test_a_model_of_another_shape_is_compiled_behind_the_first(tiny, traced):
    for changes in ({}, {"num_attention_heads": 2, "num_key_value_heads": 2}):
        model = tiny("llama", num_hidden_layers=1, **changes)
        fast, plain = both(model, num_slots=1, max_length=32)
        ours, theirs = (cached.forward([0], tokens(1, 3)).logits for cached in (fast, plain))
        assert all(fast._compiled._variants.values())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_does_not_fit_is_not_compiled(tiny, counted):
    fast, plain = both(tiny("llama"), num_slots=2, max_length=90)
    counted.clear()
    tree = Draft.from_lists([1], [[4, 5, 6, 7, 8]], [[0, 0, 0, 0, 0]])
    for cached in (fast, plain):
        cached.forward([0, 1], tokens(2, 4), commit=[4, 2])  # several sequences
        cached.forward([0], tokens(1, 66), commit=[66])  # too wide
        cached.forward([1], tokens(1, 80), keep=[79], commit=[80])  # a prompt
    assert counted == []
    for cached in (fast, plain):
        cached.cache.lengths[1] = 88
        cached.forward([1], tree.tokens, tree=tree)  # the cache grows
    ours, theirs = (cached.forward([0], tokens(1, 3)).logits for cached in (fast, plain))
    assert counted == []
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_greedy_output_is_that_of_generate(tiny, perturbed, prompt, greedy, counted, kind, batch):
    model = tiny("gemma3")
    target = Target(model, max_batch_size=batch, compiles=True)
    near = perturbed(model)
    if kind == "chain":
        drafter = LMDrafter(near, target=target, draft_length=4)
    else:
        drafter = ExpansionTrees().build(near, target)
    prompts = [prompt(length) for length in LENGTHS]
    outputs = decoded(target, drafter, prompts)
    assert outputs == [greedy(model, ids, NEW_TOKENS) for ids in prompts]
    # The start's are eight; at the end of a batch one sequence may be alone.
    assert len(counted) > (60 if batch == 1 else 7)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda *inputs: (torch.full((1, 1, 97), torch.nan), {}), "gives other numbers"),
        (lambda *inputs: (torch.zeros(1, 1, 97), {}), "gives other numbers"),
        (lambda *inputs: 1 / 0, r"cannot be compiled \(ZeroDivisionError: division by zero\)"),
    ],
)
@torch.no_grad()
def test_a_compiled_forward_that_is_wrong_is_not_taken(tiny, monkeypatch, wrong, said):
    monkeypatch.setattr(torch, "compile", lambda function, **options: wrong)
    with pytest.warns(UserWarning, match=f"the forward of LlamaForCausalLM {said}") as warned:
        fast = CachedModel(tiny("llama"), num_slots=1, compiles=True)
    assert len(warned) == (1 if "cannot" in said else 2)  # what cannot be is not tried again
    plain = CachedModel(tiny("llama"), num_slots=1)
    ours, theirs = (cached.forward([0], tokens(1, 3)).logits for cached in (fast, plain))
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_a_compiled_forward_that_fails_later_is_left(tiny, counted):
    fast, plain = both(tiny("llama"), num_slots=1)

    def failing(inputs):
        raise RuntimeError("recompiled too often")

    fast._compiled._variants[False, ()] = failing
    with pytest.warns(UserWarning, match="fails once it is compiled .*recompiled too often"):
        ours = fast.forward([0], tokens(1, 3)).logits
    theirs = plain.forward([0], tokens(1, 3)).logits
    assert torch.equal(ours, theirs)
    assert torch.equal(fast.forward([0], tokens(1, 3)).logits, theirs)  # and no warning


@torch.no_grad()
def test_unknown_tokens_are_refused_as_the_embedding_does(tiny, counted):
    cached = CachedModel(tiny("llama"), num_slots=1, compiles=True)
    for bad in ([[3, 97]], [[-1]]):
        with pytest.raises(IndexError, match="index out of range"):
            cached.forward([0], torch.tensor(bad))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@torch.no_grad()
def test_recordings_are_replayed_over_copies_and_padded_keys(
    tiny, counted, monkeypatch, architecture
):
    """What a GPU does, with a recording that is the forward itself, into the same tensors."""
    recorded = []

    def record(run):
        outputs = run()
        recorded.append(outputs)

        def replay():
            for old, new in zip(outputs[0], run()[0], strict=True):
                old.copy_(new)

        return replay, outputs

    monkeypatch.setattr(decode.compiled_forward, "record", record)
    fast, plain = both(tiny(architecture), num_slots=2, max_length=90)
    fast._compiled._records = True
    outputs = []
    for cached in (fast, plain):
        found = []
        for slot in (0, 1):
            cached.forward([slot], tokens(1, 12), keep=[], commit=[12])
            for step in range(3):
                found.append(cached.forward([slot], tokens(1, 3) + step, commit=[2]).logits)
        cached.forward([0], tokens(1, 60), keep=[], commit=[60])
        found.append(cached.forward([0], tokens(1, 3)).logits)
        outputs.append(found)
    # One for each slot and one for more keys, each as many as the cache has at most.
    keys = [key[-1] for key in fast._compiled._recordings]
    assert keys == [64, 64, 91]
    assert len(recorded) == 3
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_few_numbers_of_keys_are_recorded():
    assert [rounded_up(n) for n in (1, 64, 65, 300, 1000, 1025)] == [64, 64, 128, 320, 1024, 1280]
    numbers = {rounded_up(n) for n in range(1, 32_769)}
    assert len(numbers) < 40
    assert all(n <= rounded_up(n) <= 1.25 * n for n in range(256, 32_769))
    mask = padded(torch.zeros(1, 1, 2, 3), 5)
    assert mask.shape == (1, 1, 2, 5)
    assert (mask[..., 3:] == torch.finfo(torch.float32).min).all()
    assert (mask[..., :3] == 0).all()


def test_compiled_code_is_kept_where_the_user_says_or_among_his_caches(monkeypatch, tmp_path):
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(name, "/elsewhere")
    keep_compiled_code()
    assert os.environ[name] == "/elsewhere"
    monkeypatch.delenv(name)
    keep_compiled_code()
    assert os.environ[name] == str(tmp_path / "draftsmith" / "torch")
    (tmp_path / "file").touch()  # stands for a home that cannot be written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv(name)
    keep_compiled_code()
    folder = Path(os.environ[name])
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o77 == 0  # nobody else puts code there


def test_models_that_are_not_compiled_are_refused(tiny, monkeypatch):
    monkeypatch.setattr("decode.cached_model.is_int8", lambda model: True)
    with pytest.raises(ValueError, match="choose one of quantization and compile"):
        CachedModel(tiny("llama"), num_slots=1, compiles=True)


WITHOUT_COMPILER = """
import sys, torch, warnings
from transformers import GPT2Config, GPT2LMHeadModel
from decode import Target
shape = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 20, "n_positions": 32}
Target(GPT2LMHeadModel(GPT2Config(**shape)), compiles=True)
"""


@pytest.mark.slow
def test_without_a_compiler_one_sentence_says_so(tmp_path):
    environment = {**os.environ, "CXX": "/no/such/compiler", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = "no C++ compiler works here: install g++, or name one in the variable CXX"
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_for_good_the_output_is_that_of_generate(
    tiny, perturbed, prompt, greedy, capsys, architecture
):
    model = copy.deepcopy(tiny(architecture))
    lay_out_for_decoding(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        target = Target(model, max_batch_size=1, compiles=True)
        drafter = LMDrafter(perturbed(tiny(architecture)), target=target, draft_length=4)
    prompts = [prompt(length) for length in LENGTHS]
    outputs = [greedy(tiny(architecture), ids, NEW_TOKENS) for ids in prompts]
    assert decoded(target, drafter, prompts) == outputs
    assert decoded(target, ExpansionTrees().build(tiny(architecture), target), prompts) == outputs
    assert "for one token in" in capsys.readouterr().err
    assert all(target.cached._compiled._variants.values())


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_gpu_recorded_forwards_give_the_output_of_generate(
    tiny, perturbed, prompt, greedy, architecture, batch
):
    target = Target(copy.deepcopy(tiny(architecture)).cuda(), max_batch_size=batch, compiles=True)
    near = copy.deepcopy(perturbed(tiny(architecture))).cuda()
    drafter = LMDrafter(near, target=target, draft_length=4)
    prompts = [prompt(length) for length in LENGTHS]
    outputs = [greedy(tiny(architecture), ids, NEW_TOKENS) for ids in prompts]
    assert decoded(target, drafter, prompts) == outputs
    assert all(target.cached._compiled._variants.values())
    assert batch > 1 or len(target.cached._compiled._recordings) > 0
