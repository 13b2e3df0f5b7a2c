"""When an output ends: how many of a step's new tokens are kept, and why."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from decode import SamplingParams
from decode.stopping import Stopping, first_of

EOS = 0
PLAIN = Stopping(frozenset([EOS]))


def cut(output, new, stopping=PLAIN, **params):
    return stopping.cut(output, new, SamplingParams(**params))


@pytest.mark.parametrize(
    ("output", "new", "params", "expected"),
    [
        ([], [5, 6, 7], {}, (3, None)),
        # EOS: first, inside, last; the first of two counts
        ([5], [EOS, 6, 7], {}, (1, "eos")),
        ([5], [6, EOS, 7], {}, (2, "eos")),
        ([5], [6, 7, EOS], {}, (3, "eos")),
        ([5], [6, EOS, EOS], {}, (2, "eos")),
        # ... and one that was emitted before (ignored then) ends nothing now
        ([EOS], [6, 7], {}, (2, None)),
        ([5], [6, EOS, 7], {"ignore_eos": True}, (3, None)),
        # length: before, at and behind the end of the new tokens
        ([5, 5], [6, 7, 8], {"max_new_tokens": 3}, (1, "length")),
        ([5, 5], [6, 7, 8], {"max_new_tokens": 5}, (3, "length")),
        ([5, 5], [6, 7, 8], {"max_new_tokens": 6}, (3, None)),
        # both: whichever comes first; EOS at the limit is an EOS
        ([5], [6, EOS, 7], {"max_new_tokens": 2}, (1, "length")),
        ([5], [6, EOS, 7], {"max_new_tokens": 3}, (2, "eos")),
        ([5], [6, EOS, 7], {"max_new_tokens": 4}, (2, "eos")),
        ([5], [6, EOS, 7], {"max_new_tokens": 3, "ignore_eos": True}, (2, "length")),
    ],
)
def test_eos_and_length(output, new, params, expected):
    assert cut(output, new, **params) == expected


def test_there_may_be_several_eos_tokens_or_none():
    several = Stopping(frozenset([3, 9]))
    assert cut([], [5, 9, 3], several) == (2, "eos")
    assert cut([], [5, EOS, 4], Stopping(frozenset())) == (3, None)


def test_first_of():
    assert first_of([4, 2, 8, 2], {2, 8}) == 1
    assert first_of([4, 2], {7}) is None
    assert first_of([], {7}) is None


# Stop strings. The tokens are syllables; texts run across their borders.


@pytest.fixture
def words(tokenizer):
    """`words("ba be bi")` -> ids, and a Stopping that can read them."""
    return tokenizer.convert_tokens_to_ids, Stopping(frozenset([EOS]), tokenizer)


@pytest.mark.parametrize(
    ("before", "new", "stop", "expected"),
    [
        ("", "ba be bi bo", "be", (2, "stop")),
        ("", "ba be bi bo", "abe", (2, "stop")),  # begins inside a token
        ("", "ba be bi bo", "abeb", (3, "stop")),  # ends inside a token, which stays whole
        ("", "ba be bi bo", "o", (4, "stop")),
        ("", "ba be bi bo", "x", (4, None)),
        ("ba be", "bi bo", "eb", (1, "stop")),  # begun in an earlier step
        ("ba be bi", "bo du", "abebibod", (2, "stop")),  # ... or in several
        ("ba be", "bi bo", "be", (2, None)),  # complete before: it would have stopped then
        ("ba be", "bi be", "be", (2, "stop")),  # complete before, and again now
        ("ba", "ba ba ba", "aba", (1, "stop")),  # overlapping itself
        ("", "ba be </s> bo", "be", (2, "stop")),  # before EOS
        ("", "ba </s> be", "be", (2, "eos")),  # after EOS
        ("", "ba be </s>", "e</s>", (3, "eos")),  # with EOS: EOS is the reason
    ],
)
def test_stop_strings(words, before, new, stop, expected):
    ids, stopping = words
    assert cut(ids(before.split()), ids(new.split()), stopping, stop=(stop,)) == expected


def test_the_first_of_several_stop_strings_counts(words):
    ids, stopping = words
    new = ids(["ba", "be", "bi", "bo"])
    assert cut([], new, stopping, stop=("bo", "eb", "x")) == (3, "stop")


def test_a_stop_string_behind_the_limit_does_not_count(words):
    ids, stopping = words
    new = ids(["ba", "be", "bi", "bo"])
    assert cut([], new, stopping, stop=("bi",), max_new_tokens=2) == (2, "length")
    assert cut([], new, stopping, stop=("be",), max_new_tokens=2) == (2, "stop")


def test_a_stop_string_may_be_longer_than_any_token(words):
    ids, stopping = words
    output = ids(["ba", "du"] * 40)
    text = "badu" * 40
    for length in (1, 7, 30, 121):
        stop = text[-length:] + "x"
        assert cut(output, ids(["xa"]), stopping, stop=(stop,)) == (1, "stop")
        assert cut(output, ids(["xa"]), stopping, stop=("y" + stop,)) == (1, None)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"\('end',\) need a tokenizer"):
        cut([], [5], stop=("end",))


def test_a_character_may_be_written_in_several_tokens():
    """Byte tokens: "é" is two, "🎉" four. Half a character is no character yet."""
    core = Tokenizer(models.BPE(vocab={f"<0x{n:02X}>": n for n in range(256)}, merges=[],
                                byte_fallback=True))  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stopping = Stopping(frozenset(), PreTrainedTokenizerFast(tokenizer_object=core))
    text = list("café 🎉 fin".encode())
    end = len("café 🎉".encode())
    for done in range(len(text)):
        kept, reason = cut(text[:done], text[done:], stopping, stop=("🎉",))
        if done < end:
            assert (kept, reason) == (end - done, "stop")
        else:
            assert (kept, reason) == (len(text) - done, None)
