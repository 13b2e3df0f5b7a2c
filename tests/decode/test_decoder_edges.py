"""Where outputs begin and end, what is refused, and what a drafter is told."""

import copy
import itertools

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from decode import (
    Context,
    Draft,
    GenerationResult,
    GenerationStats,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.drafters import LMDrafter, NoDrafter
from decode.sampling import warp


def request(name: object, prompt: list[int], **params: object) -> Request:
    sampling = SamplingParams(**({"max_new_tokens": 12} | params))
    return Request(id=str(name), prompt=prompt, sampling=sampling)


def decoder_of(model, drafter_model=None, *, slots=4, draft_length=4, tokenizer=None, **target):
    """With `drafter_model`, or the model as its own drafter: then every draft is accepted."""
    wrapped = Target(model, max_batch_size=slots, **target)
    drafter = LMDrafter(drafter_model or model, target=wrapped, draft_length=draft_length)
    return SpeculativeDecoder(wrapped, drafter, tokenizer=tokenizer)


def one(decoder: SpeculativeDecoder, prompt: list[int], **params: object) -> GenerationResult:
    return decoder.generate([request("one", prompt, **params)])[0]


@pytest.fixture(scope="session")
def distinct(tiny, greedy):
    """A prompt whose greedy output begins with twelve different tokens, and that output."""
    for start in range(97):
        output = greedy(tiny("llama"), [start, 3], 12)
        if len(set(output)) == 12:
            return [start, 3], output
    raise AssertionError("no such prompt")


def capacity(decoder: SpeculativeDecoder) -> int:
    """How many requests it takes before it needs to finish one: the slots that are free."""
    taken = []

    def feed():
        for index in itertools.count():
            taken.append(index)
            yield request(index, [1, 2], max_new_tokens=2)

    stream = decoder.stream(feed())
    next(stream)
    stream.close()
    return len(taken)


# With the target as its own drafter and γ = 4, output 0 comes with the prompt, 1-4 are drafted, 5
# is the bonus, 6-9 are drafted, 10 is the bonus.
PLACES = pytest.mark.parametrize(
    "place", [0, 1, 3, 4, 5, 6], ids=["prompt", "first", "inside", "last", "bonus", "second draft"]
)


@PLACES
def test_eos_ends_an_output_wherever_it_falls(tiny, distinct, place):
    text, output = distinct
    model = tiny("llama", eos_token_id=output[place])
    result = one(decoder_of(model), text)
    assert result.tokens == output[: place + 1]
    assert result.finish_reason == "eos"
    assert sum(step.num_emitted for step in result.steps) == place + 1
    theirs = model.generate(torch.tensor([text]), max_new_tokens=12, do_sample=False)
    assert theirs[0, len(text) :].tolist() == result.tokens


@PLACES
def test_eos_may_be_ignored(tiny, distinct, place):
    text, output = distinct
    model = tiny("llama", eos_token_id=output[place])
    result = one(decoder_of(model), text, ignore_eos=True)
    assert (result.tokens, result.finish_reason) == (output, "length")


def test_a_model_may_have_several_eos_tokens(tiny, distinct):
    text, output = distinct
    model = copy.deepcopy(tiny("llama"))
    model.generation_config.eos_token_id = [output[7], output[2]]
    assert one(decoder_of(model), text).tokens == output[:3]


@pytest.mark.parametrize("limit", range(1, 12))
@pytest.mark.parametrize("slots", [1, 4])
def test_the_limit_cuts_a_draft(tiny, distinct, limit, slots):
    text, output = distinct
    decoder = decoder_of(tiny("llama"), slots=slots)
    cut, other = decoder.generate(
        [request("cut", text, max_new_tokens=limit), request("other", text)]
    )
    assert (cut.tokens, cut.finish_reason) == (output[:limit], "length")
    assert other.tokens == output
    for result in (cut, other):  # no more was drafted than still fitted
        emitted = list(itertools.accumulate(step.num_emitted for step in result.steps))
        for before, step in itertools.pairwise([0, *emitted]):
            assert step > before
        for before, step in zip([0, *emitted], result.steps, strict=False):
            assert step.num_drafted <= len(result.tokens) - before - 1


@PLACES
def test_a_stop_string_ends_with_the_token_that_completes_it(tiny, tokenizer, distinct, place):
    text, output = distinct
    syllables = tokenizer.convert_ids_to_tokens(output)
    # The second half of one token and the first of the next; at the first place, one token alone.
    word = syllables[place - 1][-1] + syllables[place][0] if place else syllables[0]
    written = "".join(syllables)
    decoder = decoder_of(tiny("llama"), tokenizer=tokenizer)
    result = one(decoder, text, stop=("never", word))
    first = next(n for n in range(1, 13) if word in "".join(syllables[:n]))
    assert first <= place + 1
    assert (result.tokens, result.finish_reason) == (output[:first], "stop")
    assert word in tokenizer.decode(result.tokens)
    assert word in written


def test_a_stop_string_may_be_long(tiny, tokenizer, distinct):
    text, output = distinct
    word = tokenizer.decode(output[2:9])[1:-1]  # from within token 2 to within token 8
    result = one(decoder_of(tiny("llama"), tokenizer=tokenizer), text, stop=(word,))
    assert result.tokens == output[:9]


def test_the_prompt_does_not_count_for_stop_strings(tiny, tokenizer, distinct):
    text, output = distinct
    word = tokenizer.decode(text)
    result = one(decoder_of(tiny("llama"), tokenizer=tokenizer), text, stop=(word,))
    assert result.tokens == output


def test_stop_strings_without_a_tokenizer_are_refused(tiny, distinct):
    text, output = distinct
    decoder = decoder_of(tiny("llama"), slots=2)
    with pytest.raises(ValueError, match=r"stop strings .* need a tokenizer"):
        one(decoder, text, stop=("x",))
    assert one(decoder, text).tokens == output
    assert capacity(decoder) == 2


# The context


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("slots", [1, 4])
def test_a_sequence_ends_with_the_context(tiny, perturbed, prompt, greedy, architecture, slots):
    model = tiny(architecture)  # context 96
    lengths = [90, 3, 95, 80, 96, 7, 100, 88]
    decoder = decoder_of(model, perturbed(model), slots=slots)
    texts = [prompt(length) for length in lengths]
    results = decoder.generate(
        [request(row, text, max_new_tokens=30) for row, text in enumerate(texts)]
    )
    for text, result in zip(texts, results, strict=True):
        room = 96 - len(text)
        if room <= 0:
            assert (result.tokens, result.finish_reason) == ([], "context")
            assert result.stats == GenerationStats()
        else:
            assert result.tokens == greedy(model, text, min(30, room))
            assert result.finish_reason == "length"


def test_max_length_is_a_context_of_its_own(tiny, perturbed, prompt, greedy):
    model = tiny("llama")
    decoder = decoder_of(model, perturbed(model), max_length=20)
    results = decoder.generate([request(n, prompt(n), max_new_tokens=30) for n in (2, 15, 20)])
    assert [len(result.tokens) for result in results] == [18, 5, 0]
    assert results[0].tokens == greedy(model, prompt(2), 18)


def rotary(context: int, **rope: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=context, initializer_range=0.5,
        eos_token_id=None, bos_token_id=None, rope_parameters={"rope_theta": 10000.0} | rope,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 24,
}


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    "context_and_rope", [(24, {"rope_type": "dynamic", "factor": 4.0}), (96, LONG)]
)
def test_padding_does_not_stretch_rotary_positions(perturbed, prompt, slots, context_and_rope):
    """Such scaling looks at the largest position of a forward; padding has none of its own."""
    context, rope = context_and_rope
    model = rotary(context, **rope)
    decoder = decoder_of(model, perturbed(model), slots=slots, max_length=24)
    texts = [prompt(22), prompt(4), prompt(9)]
    results = decoder.generate(
        [request(row, text, max_new_tokens=30) for row, text in enumerate(texts)]
    )
    for text, result in zip(texts, results, strict=True):
        assert len(result.tokens) == 24 - len(text)
        with torch.no_grad():
            logits = model(torch.tensor([text + result.tokens])).logits[0]
        assert logits.argmax(-1)[len(text) - 1 : -1].tolist() == result.tokens


def test_rotary_scaling_that_switches_inside_the_context_is_refused():
    """Cached keys, drafts and neighbours would be turned by one scale or the other."""
    with pytest.raises(ValueError, match=r"longrope.* max_length=24"):
        Target(rotary(96, **LONG))


def test_a_drafter_may_have_the_shorter_context(tiny, perturbed, prompt, greedy):
    model = tiny("llama")
    short = tiny("gpt2", max_position_embeddings=20, num_hidden_layers=1)
    decoder = decoder_of(model, short)
    lengths = [2, 19, 20, 21, 40]
    results = decoder.generate([request(n, prompt(n), max_new_tokens=30) for n in lengths])
    for length, result in zip(lengths, results, strict=True):
        assert result.tokens == greedy(model, prompt(length), 30)
        at = length
        for step in result.steps:
            # The root stands at `at - 1`; the last drafted token is never read by the drafter.
            assert at + step.num_drafted <= 20 + 1 or step.num_drafted == 0
            at += step.num_emitted
    assert results[0].stats.num_draft_tokens > 10
    assert results[-1].stats.num_draft_tokens == 0


@pytest.mark.parametrize("vocab_size", [80, 97, 120])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_vocabularies_may_be_padded_differently(tiny, prompt, greedy, vocab_size, temperature):
    """Ids that the drafter lacks occur in prompts and outputs; ids that it has on top do not."""
    model = tiny("llama")
    drafter_model = tiny("llama", seed=4, vocab_size=vocab_size)
    decoder = decoder_of(model, drafter_model)
    texts = [prompt(n) for n in (4, 9, 17)]
    assert max(map(max, texts)) >= 80
    results = decoder.generate(
        [
            request(row, text, max_new_tokens=24, temperature=temperature)
            for row, text in enumerate(texts)
        ]
    )
    assert max(max(result.tokens) for result in results) >= 80
    if temperature == 0:
        assert [r.tokens for r in results] == [greedy(model, text, 24) for text in texts]
    assert sum((r.stats for r in results), GenerationStats()).num_draft_tokens > 24


def test_a_wider_drafter_that_is_the_target_is_always_right(tiny, prompt):
    """The target with 23 more ids, which are likelier than all others but do not exist."""
    model = tiny("llama")
    wide = tiny("llama", vocab_size=120)
    wide = copy.deepcopy(wide)
    weights = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        surplus = wide.state_dict()[name][97:].clone()
        weights[name] = torch.cat([weights[name], 10 * surplus])
    wide.load_state_dict(weights)
    result = one(decoder_of(model, wide), prompt(5), max_new_tokens=24)
    assert result.stats.alpha == 1
    assert result.stats.num_accepted_tokens > 15


# Requests


def test_no_requests_no_results(tiny):
    decoder = decoder_of(tiny("llama"))
    assert decoder.generate([]) == []
    assert list(decoder.stream(iter(()))) == []


def test_an_empty_prompt_is_refused(tiny, distinct):
    text, output = distinct
    decoder = decoder_of(tiny("llama"), slots=3)
    with pytest.raises(ValueError, match="'bad' has an empty prompt"):
        decoder.generate([request("good", text), request("bad", []), request("late", text)])
    assert one(decoder, text).tokens == output
    assert capacity(decoder) == 3


def test_request_ids_are_unique(tiny):
    with pytest.raises(ValueError, match="'b' occurs more than once"):
        decoder_of(tiny("llama")).generate([request(name, [1]) for name in "abcb"])


def test_requests_are_taken_as_slots_become_free(tiny, prompt):
    taken = []

    def feed():
        for index in range(6):
            taken.append(index)
            yield request(index, prompt(3), max_new_tokens=4 if index else 30)

    decoder = SpeculativeDecoder(Target(tiny("llama"), max_batch_size=2), NoDrafter())
    stream = decoder.stream(feed())
    assert next(stream).request_id == "1"
    assert taken == [0, 1]  # two slots, two requests
    # The long one does not hold up the short ones.
    assert [result.request_id for result in stream] == ["2", "3", "4", "5", "0"]


@pytest.mark.parametrize("taken", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(2, 2, 2), (2, 2, 100), (100, 2, 2), (2, 100, 2)])
def test_a_listener_may_stop_listening(tiny, distinct, prompt, taken, lengths):
    """Between results that came in one step, too: every slot is given back."""
    text, output = distinct
    decoder = decoder_of(tiny("llama"), slots=3)
    stream = decoder.stream(
        request(row, prompt(length), max_new_tokens=6) for row, length in enumerate(lengths)
    )
    for _ in range(taken):
        next(stream)
    stream.close()
    results = decoder.generate([request(n, text) for n in range(5)])
    assert [result.tokens for result in results] == [output] * 5
    assert capacity(decoder) == 3


def test_a_failing_drafter_leaves_the_decoder_usable(tiny, distinct):
    text, output = distinct

    class Failing(NoDrafter):
        def propose(self, context: Context) -> Draft:
            raise OSError("out of ideas")

    decoder = decoder_of(tiny("llama"), slots=2)
    good, decoder.drafter = decoder.drafter, Failing()
    with pytest.raises(OSError, match="out of ideas"):
        decoder.generate([request(n, text) for n in range(2)])
    decoder.drafter = good
    assert one(decoder, text).tokens == output
    assert capacity(decoder) == 2


def test_sampling_parameters_are_each_requests_own(tiny, perturbed, prompt, greedy):
    model = tiny("llama")
    decoder = decoder_of(model, perturbed(model))
    params = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.5, "top_k": 1},  # one token to choose from: greedy
        {"temperature": 0.7, "top_k": 8, "top_p": 0.9, "max_new_tokens": 20},
    ]
    requests = [request(row, prompt(5 + row), **own) for row, own in enumerate(params)]
    together = decoder.generate(requests)
    for row, own in enumerate(requests):
        assert together[row].tokens == decoder.generate([own])[0].tokens
    for row in (0, 2):
        assert together[row].tokens == greedy(model, prompt(5 + row), 12)
    assert together[1].tokens != greedy(model, prompt(6), 12)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_top_logprobs_are_those_of_a_plain_forward(tiny, perturbed, prompt, slots, temperature):
    model = tiny("llama")
    decoder = decoder_of(model, perturbed(model), slots=slots)
    texts = [prompt(n) for n in (1, 6, 15)]
    wanted = [4, 0, 97]
    results = decoder.generate(
        [
            request(row, text, top_logprobs=k, temperature=temperature, top_k=20)
            for row, (text, k) in enumerate(zip(texts, wanted, strict=True))
        ]
    )
    for text, k, result in zip(texts, wanted, results, strict=True):
        if k == 0:
            assert result.top_logprobs is None
            continue
        found = result.top_logprobs
        with torch.no_grad():
            logits = model(torch.tensor([text + result.tokens])).logits[0, len(text) - 1 : -1]
        logprobs = (logits / (temperature or 1)).log_softmax(-1)  # before top-k
        assert found.ids.shape == found.logprobs.shape == (12, k)
        torch.testing.assert_close(
            found.logprobs, logprobs.gather(1, found.ids), atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(found.logprobs, logprobs.topk(k).values, atol=1e-4, rtol=1e-3)
        rest = logprobs.exp().scatter(1, found.ids, 0.0).sum(-1)
        torch.testing.assert_close(found.tail_mass, rest, atol=1e-5, rtol=1e-3)


def test_top_logprobs_stop_with_the_output(tiny, distinct):
    text, output = distinct
    decoder = decoder_of(tiny("llama", eos_token_id=output[3]))
    result = one(decoder, text, top_logprobs=2)
    assert result.tokens == output[:4]
    assert result.top_logprobs.ids[:, 0].tolist() == output[:4]


# Models and drafters


def test_a_model_that_keeps_recurrent_state_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MambaForCausalLM keeps state that cannot be rolled back"):
        Target(model, max_length=32)


def test_a_model_without_a_head_is_refused(tiny):
    model = LlamaModel(tiny("llama").config)
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        Target(model)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_takes_no_4d_masks_is_refused(tiny, attention):
    model = copy.deepcopy(tiny("llama"))
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=rf"{attention}.* takes no 4-D masks"):
        Target(model)


SMALL = {"vocab_size": 97, "hidden_size": 16, "bos_token_id": 0, "eos_token_id": 0}
OWN_MASKS = {
    # Biases by distance, made from a 2-D mask or from the number of keys.
    BloomForCausalLM: BloomConfig(**SMALL, n_layer=1, n_head=2),
    FalconForCausalLM: FalconConfig(
        **SMALL, num_hidden_layers=1, num_attention_heads=2, alibi=True
    ),
    MptForCausalLM: MptConfig(vocab_size=97, d_model=16, n_layers=1, n_heads=2, max_seq_len=32),
    # Counts keys to find out where its window is: silently wrong for ragged batches.
    GPTNeoForCausalLM: GPTNeoConfig(
        **SMALL, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ),
}


@pytest.mark.parametrize("architecture", OWN_MASKS)
def test_a_model_that_makes_its_own_masks_is_refused(architecture):
    model = architecture(OWN_MASKS[architecture])
    with pytest.raises(ValueError, match=rf"{architecture.__name__} .* 4-D masks"):
        Target(model, max_length=32)


def test_processors_that_would_be_left_out_are_refused(tiny):
    model = copy.deepcopy(tiny("llama"))
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match=r"no_repeat_ngram_size=3, which this runtime does not"):
        Target(model)
    model.generation_config.no_repeat_ngram_size = None
    Target(model)


def test_a_target_needs_a_slot(tiny):
    with pytest.raises(ValueError, match="max_batch_size must be >= 1, got 0"):
        Target(tiny("llama"), max_batch_size=0)


class Recording(LMDrafter):
    """Notes the states it is handed, and checks on the way that nobody is told twice."""

    hidden_layers = (0, 1, 2)

    def __init__(self, model, *, target: Target):
        super().__init__(model, target=target, draft_length=3)
        self.texts: dict[int, list[int]] = {}
        self.states: dict[int, list[torch.Tensor]] = {}
        self.finished: list[tuple[list[int], torch.Tensor]] = []

    def begin(self, slot, prompt, hidden):
        super().begin(slot, prompt, hidden)
        assert slot not in self.states
        self.states[slot] = [torch.stack([hidden[layer] for layer in self.hidden_layers])]

    def propose(self, context: Context) -> Draft:
        for row, slot in enumerate(context.slots):
            length = context.lengths[row]
            self.texts[slot] = context.tokens[row, :length].tolist()
            known = sum(part.shape[1] for part in self.states[slot])
            new = torch.stack([context.hidden[layer][row] for layer in self.hidden_layers])
            fresh = length - 1 - known  # the root's own states are not known yet
            assert fresh >= 1
            self.states[slot].append(new[:, new.shape[1] - fresh :])
            assert not new[:, : new.shape[1] - fresh].any(), "padding"
        return super().propose(context)

    def end(self, slot: int, output: list[int]) -> None:
        super().end(slot, output)
        states = torch.cat(self.states.pop(slot), dim=1)
        self.finished.append((self.texts.pop(slot), states))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_drafter_gets_the_hidden_states_it_asks_for(tiny, perturbed, prompt, architecture, slots):
    """From the prompt and from each step, without gap or overlap: together the states of all
    committed tokens but the root."""
    model = tiny(architecture)
    target = Target(model, max_batch_size=slots)
    drafter = Recording(perturbed(model), target=target)
    decoder = SpeculativeDecoder(target, drafter)
    decoder.generate([request(n, prompt(n)) for n in (1, 7, 12, 4)])
    assert len(drafter.finished) == 4
    for text, states in drafter.finished:
        with torch.no_grad():
            plain = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        assert states.shape[1] == len(text) - 1
        for row, layer in enumerate(drafter.hidden_layers):
            torch.testing.assert_close(states[row], plain[layer][0, :-1], atol=1e-4, rtol=1e-3)


def test_every_draw_is_the_targets_law_given_the_text(tiny, prompt):
    """A sanity check without statistics: nothing outside top-k is ever written."""
    model = tiny("llama")
    decoder = decoder_of(model, tiny("llama", seed=9))
    params = SamplingParams(temperature=1.0, top_k=3, max_new_tokens=20)
    requests = [Request(id=str(n), prompt=prompt(n), sampling=params) for n in (2, 5, 11)]
    for asked, result in zip(requests, decoder.generate(requests), strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*asked.prompt, *result.tokens]])
            law = warp(model(ids).logits[0, len(asked.prompt) - 1 : -1], params)
        assert (law.gather(1, torch.tensor(result.tokens)[:, None]) > 0).all()
