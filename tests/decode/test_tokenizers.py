"""Drafter and target must mean the same by an id; where they do not, the difference is named."""

import copy
import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from decode import check_tokenizers, tokenizer_hash


@pytest.fixture
def changed(tokenizer, tmp_path):
    """`changed(vocab={...}, eos_token=...)`: the same tokenizer but for this, read from files."""

    def make(vocab=None, **settings) -> PreTrainedTokenizerFast:
        tokenizer.save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] |= vocab or {}
        file.write_text(json.dumps(content))
        return AutoTokenizer.from_pretrained(tmp_path, **settings)

    return make


def test_a_tokenizer_agrees_with_itself(tokenizer, changed):
    for other in (tokenizer, copy.deepcopy(tokenizer), changed()):
        check_tokenizers(tokenizer, other)
        assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    assert len(tokenizer_hash(tokenizer)) == 64


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"ba": 3, "be": 2}, "2 tokens differ, for example 'ba' is 2 in .* and 3 in the drafter's"),
        ({"new": 97}, "1 tokens differ, for example 'new' is absent in .* and 97 in the drafter's"),
    ],
)
def test_other_ids_are_named(tokenizer, changed, vocab, message):
    other = changed(vocab)
    with pytest.raises(ValueError, match=message):
        check_tokenizers(tokenizer, other)
    with pytest.raises(ValueError, match=r"tokens differ"):
        check_tokenizers(other, tokenizer)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


@pytest.mark.parametrize("name", ["eos_token", "bos_token"])
def test_other_special_tokens_are_named(tokenizer, changed, name):
    other = changed(**{name: "ba"})
    with pytest.raises(ValueError, match=f"the drafter's {name} is 'ba', the target's '</?s>'"):
        check_tokenizers(tokenizer, other)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


def test_what_ids_do_not_depend_on_does_not_count(tokenizer, changed):
    other = changed(model_max_length=17, padding_side="left")
    check_tokenizers(tokenizer, other)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
