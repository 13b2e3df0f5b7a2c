"""Greedy identity as a certificate: what it finds, and how it tells rounding from a bug."""

import copy
import math

import pytest
import torch

from decode import Acceptance, Draft, Exactness, Target, certify, compare
from decode.certificate import greedy_output
from decode.drafters import LMDrafter


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sound_decoder_is_certified(tiny, perturbed, prompt, batch):
    model = tiny("llama")
    target = Target(model, max_batch_size=batch)
    drafter = LMDrafter(perturbed(model), target=target, draft_length=4)
    found = certify(target, drafter, [prompt(n) for n in (1, 6, 11)], max_new_tokens=20)
    assert (found.num_outputs, found.num_tokens, found.mismatches) == (3, 60, ())
    assert str(found).endswith("all are transformers' own, token for token")


class TakesAll:
    """A planted bug: whatever is drafted is accepted."""

    exactness = Exactness.GREEDY

    def accept(self, draft: Draft, target_logits: torch.Tensor, sampling: object) -> Acceptance:
        batch, width = draft.tokens.shape
        paths = [list(range(width)) for _ in range(batch)]
        return Acceptance(paths, target_logits[:, -1].argmax(-1).tolist(), [width - 1] * batch)


def test_a_bug_is_found_and_told_from_rounding(tiny, perturbed, prompt, monkeypatch):
    monkeypatch.setattr("decode.certificate.Greedy", TakesAll)
    model = tiny("llama")
    target = Target(model)
    drafter = LMDrafter(perturbed(model), target=target, draft_length=4)
    prompts = [prompt(n) for n in (1, 6, 11)]
    found = certify(target, drafter, prompts, max_new_tokens=20)
    assert found.num_wrong > 0
    assert f"{found.num_wrong} elsewhere (a bug: please report it)" in str(found)
    worst = found.mismatches[0]
    assert worst.request_id in str(found)
    ids = prompts[int(worst.request_id.split()[1])]
    own = greedy_output(model, ids, 20)
    logits = model(torch.tensor([[*ids, *own[: worst.position]]])).logits[0, -1].detach()
    assert worst.expected == own[worst.position] == int(logits.argmax())
    best = logits.topk(2).values
    assert worst.margin == pytest.approx(float(best[0] - best[1]), abs=1e-4)
    assert worst.gap == pytest.approx(float(best[0] - logits[worst.found]), abs=1e-4)


def test_only_a_near_tie_excuses_a_mismatch(tiny, prompt):
    model = copy.deepcopy(tiny("llama"))  # the tie is put into its weights
    ids = prompt(4)
    logits = model(torch.tensor([ids])).logits[0, -1].detach()
    best, *_, last = logits.argsort(descending=True).tolist()
    far = compare(model, "r", ids, [best], [last])
    assert (far.position, far.expected, far.found, far.near_tie) == (0, best, last, False)
    with torch.no_grad():
        model.lm_head.weight[last] = model.lm_head.weight[best]
    assert compare(model, "r", ids, [best], [last]).near_tie
    assert compare(model, "r", ids, [best], [best]) is None


def test_an_output_that_ends_early_is_no_rounding(tiny, prompt):
    found = compare(tiny("llama"), "r", prompt(4), [5, 6, 7], [5, 6])
    assert (found.position, found.expected, found.found) == (2, 7, None)
    assert math.isinf(found.gap)
    assert not found.near_tie
