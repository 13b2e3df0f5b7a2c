"""Heads on the target's last state: what they compute, how they draft, and that nothing is lost."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import (
    Chains,
    ConfidentChains,
    CostAwareChains,
    DynamicTrees,
    ExpansionTrees,
    HeuristicChains,
    HybridChains,
    MergedTrees,
    PlannedTrees,
    load_drafter,
    prefix,
)
from decode.models import Blockwise, Heads, Hydra, Medusa, TargetEnds, load_heads, save_heads
from decode.models.heads import measured_scale

SETTINGS = {
    "medusa": Medusa(num_heads=3),
    "medusa, shared": Medusa(num_heads=3, share_head=True),
    "hydra": Hydra(num_heads=3, num_layers=2),
    "hydra++": Hydra(num_heads=3, num_layers=2, prefix_attention=True),
    "hydra, shared": Hydra(num_heads=3, share_head=True),
    "blockwise": Blockwise(num_heads=3, hidden_size=24),
}
DRAFTINGS = {
    "chain": Chains(length=3),
    "chain, longer than the heads": Chains(length=7),
    "expansion": ExpansionTrees(counts=(3, 2, 2)),
    "planned": PlannedTrees(parents=(0, 0, 1, 1, 2, 4), ranks=(0, 1, 0, 2, 0, 0)),
    "independent": ExpansionTrees(counts=(2, 2, 1), children="independent"),
    "dynamic": DynamicTrees(width=3, depth=3, size=8),
    "merged": MergedTrees(budget=8),
}
EACH = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
SMALL = 11  # tokens: random heads are right now and then


def random_heads(settings, model, scale: float = 0.5, seed: int = 5) -> Heads:
    """Heads away from their first weights, which would draft what the target has just said."""
    heads = settings.build(model).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale / max(parameter.shape[-1], 1) ** 0.5)
    return heads


def formula(settings, heads: Heads, model, hidden, tokens, depth: int) -> torch.Tensor:
    """[V] logits of the head for `depth`, from the papers' formulas and the stored weights."""
    w = heads.state_dict()
    k = depth - 1
    if isinstance(settings, Medusa):
        x = hidden + functional.silu(
            hidden @ w[f"blocks.{k}.linear.weight"].T + w[f"blocks.{k}.linear.bias"]
        )
    elif isinstance(settings, Hydra):
        embedded = model.get_input_embeddings()(torch.tensor(tokens))
        x = torch.cat([hidden, *embedded])
        for layer in range(settings.num_layers):
            name = f"layers.{k}.{layer}.linear"
            residual = hidden if layer == 0 else x
            x = residual + functional.silu(w[f"{name}.weight"] @ x + w[f"{name}.bias"])
    else:
        inner = functional.relu(w["inner.weight"] @ hidden + w["inner.bias"])
        size = len(hidden)
        rows = slice(k * size, (k + 1) * size)
        x = hidden + w["outer.weight"][rows] @ inner + w["outer.bias"][rows]
    if f"outputs.{k}.weight" in w:
        return w[f"outputs.{k}.weight"] @ x
    return model.get_output_embeddings().weight @ x


def requests_of(prompts, **params) -> list[Request]:
    sampling = SamplingParams(**({"max_new_tokens": 16} | params))
    return [Request(id=str(n), prompt=p, sampling=sampling) for n, p in enumerate(prompts)]


@EACH
def test_untrained_heads_say_what_the_target_says_where_they_stand(settings, tiny):
    model = tiny("llama")
    heads = settings.build(model)
    hidden = torch.randn(2, 32)
    logits = model.lm_head(hidden)
    for depth in (1, 2, 3):
        ours = heads.logits(depth, heads.prepare(hidden), torch.zeros(2, depth, dtype=torch.long))
        torch.testing.assert_close(ours, logits)


@EACH
@pytest.mark.parametrize("architecture", ["granite", "cohere2", "gemma2"])
def test_untrained_heads_are_as_sure_as_the_target_that_scales_its_logits(
    settings, architecture, tiny, prompt
):
    model = tiny(architecture)
    heads = settings.build(model)
    with torch.no_grad():
        output = model(torch.tensor([prompt(9)]), output_hidden_states=True)
    prepared = heads.prepare(output.hidden_states[-1][0])
    ours = heads.logits(1, prepared, torch.zeros(9, 1, dtype=torch.long))
    torch.testing.assert_close(ours, output.logits[0])


def test_scales_are_measured_in_half_precision_too(tiny):
    half = copy.deepcopy(tiny("granite")).to(torch.bfloat16)
    assert TargetEnds.of(half).scale == pytest.approx(1 / 6, rel=1e-3)
    assert TargetEnds.of(copy.deepcopy(tiny("gemma2")).to(torch.bfloat16)).scale == 1


def test_a_scale_is_found_under_a_bias_and_a_cap():
    head, states = torch.nn.Linear(8, 20), torch.randn(5, 8)
    logits = 3 * torch.tanh(head(0.3 * states) / 3)
    assert measured_scale(head, 3.0, states, logits) == pytest.approx(0.3, rel=1e-4)
    assert measured_scale(head, None, states, logits) is None


@EACH
def test_chains_are_the_formulas_on_the_state_before_the_root(settings, tiny, prompt):
    """Every draft of a run against a plain forward over the text and the papers' formulas."""
    model = tiny("llama", vocab_size=SMALL)
    heads = random_heads(settings, model)
    target = Target(model, max_batch_size=2)
    steps = []
    decoder = SpeculativeDecoder(
        target, Chains(length=3).build(heads, target), on_step=steps.append
    )
    requests = requests_of([prompt(n, SMALL) for n in (1, 6, 9)])
    results = {r.request_id: r for r in decoder.generate(requests)}
    assert any(step.path for step in steps), "nothing was ever accepted"
    for step in steps:
        asked = requests[int(step.request_id)]
        text = [*asked.prompt, *results[step.request_id].tokens][: step.length]
        with torch.no_grad():
            states = model(torch.tensor([text]), output_hidden_states=True).hidden_states[-1]
            if heads.prefix is not None:
                sees = torch.ones(step.length, step.length, dtype=torch.bool).tril()[None, None]
                states = heads.prefix(states, sees, torch.arange(step.length)[None])
            for depth in range(1, len(step.tokens)):
                logits = formula(settings, heads, model, states[0, -2], step.tokens[:depth], depth)
                assert step.tokens[depth] == int(logits.argmax())


def test_the_prefix_layer_reads_a_long_prompt_in_parts(tiny, prompt, monkeypatch):
    model = tiny("llama", vocab_size=SMALL)
    heads = random_heads(SETTINGS["hydra++"], model)
    taus = []
    for chunk in (512, 4):
        monkeypatch.setattr(prefix, "PREFILL_CHUNK", chunk)
        target = Target(model, max_batch_size=2)
        drafter = Chains(length=3).build(heads, target)
        results = SpeculativeDecoder(target, drafter).generate(
            requests_of([prompt(n, SMALL) for n in (21, 3, 17)])
        )
        taus.append([result.stats.num_accepted_tokens for result in results])
    assert taus[0] == taus[1]


@EACH
def test_one_forward_of_the_target_per_step_and_none_to_draft(settings, tiny, prompt):
    """Combined scoring and proposal (Stern et al. 2018, section 4): m/k + 1 calls."""
    model = tiny("llama", vocab_size=SMALL)
    target = Target(model, max_batch_size=1)
    drafter = Chains(length=3).build(random_heads(settings, model), target)
    calls, forward = [], target.cached.forward
    target.cached.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    (result,) = SpeculativeDecoder(target, drafter).generate(requests_of([prompt(5, SMALL)]))
    assert len(calls) == len(result.steps)
    assert result.stats.block_efficiency > 1


@EACH
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("drafting", DRAFTINGS.values(), ids=DRAFTINGS)
def test_greedy_output_is_the_targets(
    settings, tiny, prompt, greedy, architecture, batch, drafting
):
    model = tiny(architecture, vocab_size=SMALL)
    target = Target(model, max_batch_size=batch)
    drafter = drafting.build(random_heads(settings, model), target)
    prompts = [prompt(n, SMALL) for n in (1, 4, 9, 2, 7)]
    results = SpeculativeDecoder(target, drafter).generate(requests_of(prompts))
    for text, result in zip(prompts, results, strict=True):
        assert result.tokens == greedy(model, text, 16)
    target.cached.cache.check_integrity()


@pytest.mark.parametrize("drafting", [Chains(length=3), ExpansionTrees(counts=(2, 2))], ids=str)
@EACH
def test_the_end_of_the_output_falls_anywhere(settings, tiny, prompt, greedy, drafting):
    """At EOS, at the output's limit (a limit of one leaves no room) and at the context's end."""
    model = tiny("llama", vocab_size=SMALL, max_position_embeddings=24, eos_token_id=3)
    target = Target(model, max_batch_size=3)
    decoder = SpeculativeDecoder(target, drafting.build(random_heads(settings, model), target))
    for limit in (1, 2, 3, 40):
        prompts = [prompt(n, SMALL) for n in (1, 5, 23, 12)]
        results = decoder.generate(requests_of(prompts, max_new_tokens=limit))
        for text, result in zip(prompts, results, strict=True):
            assert result.tokens == greedy(model, text, min(limit, 24 - len(text)))


def test_what_does_not_fit_heads_is_refused(tiny):
    model = tiny("llama")
    heads, target = Medusa().build(model), Target(model)
    unfit = [Chains(min_confidence=0.5), HeuristicChains(), ConfidentChains(), CostAwareChains()]
    for drafting in [*unfit, HybridChains()]:
        with pytest.raises(ValueError, match="for drafters that are language models; heads draft"):
            drafting.build(heads, target)
    with pytest.raises(ValueError, match="a node cannot have 98 children: the target has 97"):
        ExpansionTrees(counts=(98,)).build(heads, target)
    with pytest.raises(ValueError, match="read states of 32 numbers, the target's have 16"):
        Chains().build(heads, Target(tiny("llama", hidden_size=16)))
    odd = copy.deepcopy(model)
    odd.lm_head.register_forward_hook(lambda head, given, logits: logits.square())
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than a linear"):
        Medusa().build(odd)
    for settings in (Medusa, Hydra, Blockwise):
        with pytest.raises(ValueError, match="num_heads must be >= 1, got 0"):
            settings(num_heads=0)


def test_heads_are_read_back_in_a_new_process(tiny, prompt, tmp_path):
    model = tiny("llama", vocab_size=SMALL)
    model.save_pretrained(tmp_path / "target")
    target = Target(model)
    here = {}
    for number, settings in enumerate(SETTINGS.values()):
        heads = random_heads(settings, model)
        folder = tmp_path / f"heads{number}"
        save_heads(heads, folder)
        (folder / "draftsmith.json").write_text(json.dumps({"family": settings.family}))
        decoder = SpeculativeDecoder(target, Chains(length=3).build(heads, target))
        (result,) = decoder.generate(requests_of([prompt(6, SMALL)]))
        here[str(folder)] = [result.tokens, result.stats.num_accepted_tokens]
    script = f"""
import json
from transformers import AutoModelForCausalLM
from decode import Request, SamplingParams, SpeculativeDecoder, Target
from decode.drafters import load_drafter
target = Target(AutoModelForCausalLM.from_pretrained({str(tmp_path / "target")!r}))
there = {{}}
for folder in {list(here)!r}:
    decoder = SpeculativeDecoder(target, load_drafter(folder, target=target, draft=3))
    sampling = SamplingParams(max_new_tokens=16)
    request = Request(id="0", prompt={prompt(6, SMALL)!r}, sampling=sampling)
    (result,) = decoder.generate([request])
    there[folder] = [result.tokens, result.stats.num_accepted_tokens]
print(json.dumps(there))
"""
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(output) == here


def test_a_folder_that_does_not_fit_is_refused(tiny, tmp_path):
    model = tiny("llama")
    folder = tmp_path / "heads"
    save_heads(Medusa(num_heads=2).build(model), folder)
    with pytest.raises(
        ValueError, match="hidden_size=32 and vocab_size=97, this one has hidden_size=32 and vocab"
    ):
        load_heads(folder, tiny("llama", vocab_size=SMALL))
    with pytest.raises(ValueError, match="hidden_size=16"):
        load_heads(folder, tiny("llama", hidden_size=16))

    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_text(json.dumps(config | {"settings": {"num_heads": 3}}))
    with pytest.raises(ValueError, match="does not hold these heads"):
        load_heads(folder, model)
    (folder / "config.json").write_text(json.dumps(config | {"settings": {"heads": 3}}))
    with pytest.raises(ValueError, match="does not describe heads"):
        load_heads(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="missing or half-written"):
        load_heads(folder, model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing or half-written"):
        load_heads(folder, model)
    (folder / "draftsmith.json").write_text(json.dumps({"family": "medusa"}))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="half-written: it has no config"):
        load_drafter(folder, target=Target(model), draft=3)


def test_rotary_angles_stay_exact_in_half_precision(tiny):
    exact, half = (SETTINGS["hydra++"].build(tiny("llama")) for _ in range(2))
    half = half.to(torch.bfloat16).float().to(torch.bfloat16)
    assert half.prefix.layer.self_attn.q_proj.weight.dtype == torch.bfloat16
    positions, hidden = torch.tensor([[0, 3000]]), torch.zeros(1, 2, 32)
    for ours, theirs in zip(
        half.prefix.rotary(hidden, positions), exact.prefix.rotary(hidden, positions), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_heads_take_the_targets_dtype_and_its_cap(tiny, prompt, tmp_path):
    model = tiny("gemma2")
    heads = random_heads(Medusa(num_heads=2), model)
    assert heads.logits(1, torch.randn(32) * 9, torch.zeros(1, dtype=torch.long)).abs().max() <= 1
    save_heads(heads, tmp_path)
    half = copy.deepcopy(model).to(torch.bfloat16)
    loaded = load_heads(tmp_path, half)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    target = Target(half)
    decoder = SpeculativeDecoder(target, Chains(length=2).build(loaded, target))
    (result,) = decoder.generate(requests_of([prompt(5)]))
    assert len(result.tokens) == 16
