"""The suffix index drafts what counting every string in every text would."""

import os
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from decode.suffix import SuffixDecodingCache, SuffixDraft, arena
from decode.suffix.compiled import cache_folder
from decode.suffix.frozen import previous


@dataclass
class ByCounting:
    """The same cache, by counting: every string of up to `depth` tokens of every text."""

    depth: int
    own: dict[int, list[int]] = field(default_factory=dict)  # prompt and output while it is active
    outputs: dict[int, list[int]] = field(default_factory=dict)

    def count(self, texts: list[list[int]]) -> Counter[tuple[int, ...]]:
        return Counter(
            tuple(text[start:end])
            for text in texts
            for start in range(len(text))
            for end in range(start, min(len(text), start + self.depth) + 1)
        )

    def best(
        self,
        request: int,
        context: list[int],
        most: int,
        factor: float,
        least: float,
        as_tree: bool,
    ) -> float:
        """The greatest score of any match in either source; chains: over all orders of ties."""
        context = context[-self.depth :]
        best = 0.0
        for texts in ([self.own[request]], list(self.outputs.values())):
            counts = self.count(texts)
            follow: dict[tuple[int, ...], list[int]] = {}
            for string in counts:
                if string:
                    follow.setdefault(string[:-1], []).append(string[-1])
            for length in range(1, len(context)):
                match = tuple(context[-length:])
                if counts[match] == 0:
                    break
                room = min(most, int(length * factor + 1e-6))
                search = self._tree if as_tree else self._chain
                best = max(best, search(counts, follow, match, room, least))
        return best

    def _tree(self, counts, follow, match, room, least):  # type: ignore[no-untyped-def]
        chances, frontier = [], [(match, 1.0)]
        while frontier:
            string, chance = frontier.pop()
            if len(string) - len(match) < room:
                for token in follow.get(string, ()):
                    below = chance * counts[(*string, token)] / counts[string]
                    if below >= least - 1e-6:
                        chances.append(below)
                        frontier.append(((*string, token), below))
        return sum(sorted(chances, reverse=True)[:room])

    def _chain(self, counts, follow, match, room, least, chance=1.0):  # type: ignore[no-untyped-def]
        tokens = follow.get(match, ())
        if room == 0 or not tokens:
            return 0.0
        top = max(counts[(*match, token)] for token in tokens)
        chance *= top / counts[match]
        if chance < least - 1e-6:
            return 0.0
        heads = [token for token in tokens if counts[(*match, token)] == top]
        return chance + max(
            self._chain(counts, follow, (*match, token), room - 1, least, chance) for token in heads
        )


def check_draft(draft: SuffixDraft, model: ByCounting, request: int, context: list[int]) -> None:
    """Every probability of a draft is the share that it says, in one of the two sources."""
    if not draft.token_ids:
        return
    match = tuple(context[-draft.match_len :])
    holds = []
    for texts in ([model.own[request]], list(model.outputs.values())):
        counts = model.count(texts)
        strings, chances = {-1: match}, {-1: 1.0}
        right = True
        rows = zip(draft.token_ids, draft.parents, draft.probs, strict=True)
        for index, (token, parent, prob) in enumerate(rows):
            string = (*strings[parent], token)
            strings[index] = string
            share = counts[string] / max(counts[strings[parent]], 1)
            chances[index] = chances[parent] * share
            right = right and abs(chances[index] - prob) < 1e-5
        holds.append(right)
    assert any(holds)
    assert draft.score == pytest.approx(sum(draft.probs), abs=1e-5)


def play(
    seed: int, *, depth: int, vocabulary: int, steps: int, evict: bool
) -> tuple[SuffixDecodingCache, ByCounting]:
    """Requests that start, grow, stop and go in any order; drafts are compared all the way."""
    rng = random.Random(seed)
    index, model = SuffixDecodingCache(depth), ByCounting(depth)
    started = 0

    def text(length: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(length)]

    for _ in range(steps):
        active = sorted(model.own)
        choice = rng.random()
        if not active or (choice < 0.15 and len(active) < 4):
            known = [token for output in model.outputs.values() for token in output]
            prompt = known[: rng.randrange(20)] if rng.random() < 0.5 else text(rng.randrange(12))
            index.start_request(started, prompt)
            model.own[started], model.outputs[started] = prompt, []
            started += 1
        elif choice < 0.25:
            request = rng.choice(active)
            index.stop_request(request)
            del model.own[request]
        elif choice < 0.32 and evict and model.outputs:
            request = rng.choice(sorted(model.outputs))
            index.evict_cached_response(request)
            del model.outputs[request]
        else:
            request = rng.choice(active)
            own = model.own[request]
            repeated = own[rng.randrange(len(own) + 1) :][: rng.randrange(1, 30)]
            tokens = repeated if repeated and rng.random() < 0.5 else text(rng.randrange(1, 6))
            index.add_active_response(request, np.array(tokens))
            model.own[request] = own + tokens
            if request in model.outputs:  # else it was taken out while it grew
                model.outputs[request] = model.outputs[request] + tokens
        for request, own in sorted(model.own.items()):
            for as_tree in (False, True):
                # No share of whole numbers comes near these: rounding decides nothing.
                factor, least = rng.choice([(1.0, 0.0977), (2.0, 0.3131), (4.0, 0.0471)])
                draft = index.speculate(
                    request,
                    own[-depth:],
                    max_spec_tokens=8,
                    max_spec_factor=factor,
                    min_token_prob=least,
                    use_tree_spec=as_tree,
                )
                best = model.best(request, own, 8, factor, least, as_tree)
                check_draft(draft, model, request, own[-depth:])
                if as_tree:
                    assert draft.score == pytest.approx(best, abs=1e-4)
                else:
                    assert draft.score <= best + 1e-4
    return index, model


@pytest.mark.parametrize("evict", [False, True])
@pytest.mark.parametrize("vocabulary", [2, 6])
@pytest.mark.parametrize("seed", [0, 1, 2, 101])
def test_drafts_are_those_of_counting(seed: int, vocabulary: int, evict: bool) -> None:
    index, model = play(seed, depth=5 + seed % 6, vocabulary=vocabulary, steps=60, evict=evict)
    assert index.num_tokens == sum(map(len, model.outputs.values()))


def test_pages_of_text_are_crossed() -> None:
    rng = random.Random(1)
    index, model = SuffixDecodingCache(30), ByCounting(30)
    text = [rng.randrange(50) for _ in range(150)]
    for request in range(3):
        index.start_request(request, [])
        model.own[request], model.outputs[request] = [], []
        for start in range(0, len(text), 7):
            tokens = text[start : start + 7]
            index.add_active_response(request, tokens)
            own = model.own[request] = model.outputs[request] = model.outputs[request] + tokens
            draft = index.speculate(request, own[-30:], use_tree_spec=True)
            best = model.best(request, own, 30, 1.0, 0.1, True)
            assert draft.score == pytest.approx(best, abs=1e-4)


def test_many_requests_at_once() -> None:
    index = SuffixDecodingCache(16)
    index.start_request("a", [1, 2, 3, 4, 1, 2])
    index.start_request("b", [5, 6, 7, 5, 6])
    asked = [("a", [4, 1, 2]), ("b", np.array([7, 5, 6])), ("a", [9, 9])]
    drafts = index.speculate_batch(asked, max_spec_factor=0.5)
    assert [draft.token_ids for draft in drafts] == [[3], [7], []]
    assert drafts == [index.speculate(*one, max_spec_factor=0.5) for one in asked]
    with pytest.raises(ValueError, match="'c' is not active"):
        index.speculate_batch([("a", [1]), ("c", [1])])


def test_a_context_that_is_not_the_end_of_the_request_is_looked_up_all_the_same() -> None:
    index = SuffixDecodingCache(16)
    index.start_request("a", [1, 2, 3, 4, 5, 6])
    assert index.speculate("a", [9, 2, 3]).token_ids == [4, 5]
    assert index.speculate("a", [9, 9]).token_ids == []
    assert index.speculate("a", []).token_ids == []


def test_the_limits_of_a_draft() -> None:
    index = SuffixDecodingCache(32)
    index.start_request("a", [*range(20), 0, 1, 2])
    context = [0, 1, 2]
    assert index.speculate("a", context).token_ids == [3, 4]  # of three tokens two are matched
    assert index.speculate("a", context, max_spec_factor=2.0).token_ids == [3, 4, 5, 6]
    assert index.speculate("a", context, max_spec_offset=1.0).token_ids == [3, 4, 5]
    assert index.speculate("a", context, max_spec_tokens=1).token_ids == [3]
    assert index.speculate("a", context, max_spec_tokens=0).token_ids == []
    assert index.speculate("a", context, min_token_prob=0.6).token_ids == []  # one of two
    everything = index.speculate("a", context, max_spec_tokens=200, max_spec_factor=99)
    assert everything.token_ids == [*range(3, 20), 0, 1, 2]  # to the end of the text


def test_among_equals_the_request_itself_is_asked() -> None:
    index = SuffixDecodingCache(8)
    index.start_request("past", [])
    index.add_active_response("past", [1, 2, 3, 1, 2])
    index.stop_request("past")
    index.start_request("now", [1, 2, 7, 1, 2])
    assert index.speculate("now", [1, 2]).token_ids == [7]


def test_the_more_frequent_continuation_wins_and_among_equals_the_first() -> None:
    index = SuffixDecodingCache(8)
    index.start_request("a", [1, 5, 1, 6])
    assert index.speculate("a", [6, 1]).token_ids == [5]
    index.add_active_response("a", [1, 6])
    assert index.speculate("a", [6, 1]).token_ids == [6]


def test_what_is_evicted_leaves_no_trace_and_its_memory_is_used_again() -> None:
    rng = np.random.default_rng(0)
    index = SuffixDecodingCache(16)
    sizes = []
    for round_ in range(12):
        texts = [rng.integers(0, 40, 300) for _ in range(4)]
        for request, text in enumerate(texts):
            index.start_request(request, [])
            index.add_active_response(request, text)
            index.stop_request(request)
        for request in rng.permutation(4):
            index.evict_cached_response(int(request))
        assert index.num_tokens == 0
        index.start_request("probe", [])
        assert index.speculate("probe", texts[0][:9]).token_ids == []
        index.stop_request("probe")
        sizes.append(index.num_bytes)
        assert round_ < 4 or sizes[-1] < 1.3 * sizes[3]


def test_the_oldest_go_when_there_are_too_many_requests() -> None:
    index = SuffixDecodingCache(8, max_cached_requests=2)
    for request in range(3):
        index.start_request(request, [])
        index.add_active_response(request, [10 * request, 1, 2, 3, 4, 5, 6, 7, 8])
        index.stop_request(request)
    assert list(index.cached_requests) == [1, 2]
    index.start_request("now", [])
    assert list(index.cached_requests) == [2, "now"]
    index.add_active_response("now", [99])  # what is too much goes with the next tokens
    assert index.speculate("now", [5, 20, 1]).match_len == 2
    for old in (0, 10):
        assert index.speculate("now", [5, old, 1]).match_len == 1
    assert index.num_tokens == 9 + 1


def test_a_budget_of_tokens_is_kept_while_others_grow() -> None:
    rng = np.random.default_rng(3)
    index, model = SuffixDecodingCache(8, max_cached_tokens=500), ByCounting(8)
    for request in range(30):
        index.start_request(request, [])
        text = rng.integers(0, 9, 100).tolist()
        for start in range(0, 100, 5):
            index.add_active_response(request, text[start : start + 5])
        index.stop_request(request)
        model.outputs[request] = text
        assert index.num_tokens <= 500 + 5
    kept = list(index.cached_requests)
    assert kept == list(range(kept[0], 30))
    assert index.num_tokens >= 300
    for _ in range(20):
        index.add_output(rng.integers(0, 9, 100))
        assert index.num_tokens <= 500


def test_without_a_cache_only_the_request_itself_is_asked() -> None:
    index = SuffixDecodingCache(8, max_cached_requests=0)
    index.start_request("a", [1, 2, 3, 1, 2])
    index.add_active_response("a", [3])
    assert index.num_tokens == 0
    assert list(index.cached_requests) == []
    assert index.speculate("a", [1, 2, 3]).token_ids == [1, 2]


def test_calls_for_requests_that_are_not_there() -> None:
    index = SuffixDecodingCache(8)
    index.start_request("a", [1])
    with pytest.raises(ValueError, match="'a' is active already"):
        index.start_request("a", [1])
    for call in (index.stop_request, index.evict_cached_response):
        with pytest.raises(ValueError, match="'b' is not"):
            call("b")
    with pytest.raises(ValueError, match="'b' is not active"):
        index.add_active_response("b", [1])
    with pytest.raises(ValueError, match="'b' is not active"):
        index.speculate("b", [1])
    with pytest.raises(ValueError, match="shape"):
        index.add_active_response("a", np.ones((2, 2), dtype=np.int32))
    with pytest.raises(ValueError, match="negative"):
        index.add_active_response("a", [3, -1])
    for depth in (0, 256):
        with pytest.raises(ValueError, match="max_tree_depth"):
            SuffixDecodingCache(depth)


def test_many_threads() -> None:
    index = SuffixDecodingCache(16)

    def work(request: int) -> int:
        rng = np.random.default_rng(request)
        index.start_request(request, rng.integers(0, 5, 20))
        for _ in range(50):
            tokens = rng.integers(0, 5, 4)
            index.add_active_response(request, tokens)
            index.speculate(request, tokens, use_tree_spec=True)
        index.stop_request(request)
        return 200

    with ThreadPoolExecutor(8) as pool:
        assert index.num_tokens == 0
        assert sum(pool.map(work, range(40))) == index.num_tokens


def test_a_full_index_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    index = SuffixDecodingCache(4)
    index.add_output([1, 2, 3, 1, 2])
    monkeypatch.setattr(arena, "LARGEST", 50_000)
    with pytest.raises(OverflowError, match="index is full with"):
        index.add_output(np.random.default_rng(0).integers(0, 1000, 100_000))
    index.start_request("a", [])
    assert index.speculate("a", [9, 1, 2]).match_len == 2


def test_large_vocabularies_and_busy_nodes() -> None:
    rng = np.random.default_rng(5)
    index = SuffixDecodingCache(6)
    text = np.stack([np.full(4000, 7), rng.permutation(200_000)[:4000]], 1).ravel()
    index.start_request("a", [])
    index.add_active_response("a", text)
    for token in text[1::2][:50]:
        assert index.speculate("a", [7, int(token)]).token_ids == [7]


@pytest.mark.parametrize("as_tree", [False, True])
def test_the_reference_drafts_the_same(as_tree: bool) -> None:
    reference = pytest.importorskip("arctic_inference.suffix_decoding")
    rng = np.random.default_rng(7)
    ours, theirs = SuffixDecodingCache(24), reference.SuffixDecodingCache(24)
    source = rng.integers(0, 30, 400).astype(np.int32)
    for request in range(30):
        start = rng.integers(0, 300)
        text = source[start : start + 100].copy()
        text[rng.random(100) < 0.1] = rng.integers(0, 30)
        for cache in (ours, theirs):
            cache.start_request(request, text[:20])
        for at in range(20, 100, 4):
            context = np.ascontiguousarray(text[max(0, at - 24) : at])
            drafts = [
                cache.speculate(request, context, max_spec_tokens=16, use_tree_spec=as_tree)
                for cache in (ours, theirs)
            ]
            assert drafts[0].token_ids == drafts[1].token_ids
            assert drafts[0].parents == drafts[1].parents
            for cache in (ours, theirs):
                cache.add_active_response(request, text[at : at + 4])


def filled(depth: int, vocabulary: int, *, tokens: int = 2_000, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    source = rng.integers(0, vocabulary, 300)
    texts = []
    while sum(map(len, texts)) < tokens:
        start = rng.integers(0, 200)
        text = source[start : start + rng.integers(2, 100)].copy()
        text[rng.random(len(text)) < 0.1] = rng.integers(0, vocabulary)
        texts.append(text)
    return texts


def drafts_of(index: SuffixDecodingCache, contexts: list[np.ndarray]) -> list[tuple[object, ...]]:
    index.start_request("asking", [])
    found = []
    for context in contexts:
        for as_tree in (False, True):
            draft = index.speculate(
                "asking", context, max_spec_tokens=12, max_spec_factor=2.0, use_tree_spec=as_tree
            )
            found.append((draft.token_ids, draft.parents, draft.probs, draft.match_len))
    index.stop_request("asking")
    index.evict_cached_response("asking")
    return found


@pytest.mark.parametrize("vocabulary", [3, 40, 60_000, 200_000])
def test_a_frozen_index_drafts_what_it_was_made_of(tmp_path: Path, vocabulary: int) -> None:
    index = SuffixDecodingCache(16)
    for text in filled(16, vocabulary):
        index.add_output(text)
    contexts = [text[:end] for text in filled(16, vocabulary, tokens=500, seed=0) for end in (3, 9)]
    expected = drafts_of(index, contexts)
    assert any(found[0] for found in expected)
    index.save(tmp_path / "index")
    opened = SuffixDecodingCache.open(tmp_path / "index")
    assert opened.max_tree_depth == 16
    assert drafts_of(opened, contexts) == expected


def test_saving_again_keeps_what_was_there_and_what_is_new(tmp_path: Path) -> None:
    first, second = filled(16, 30, seed=1), filled(16, 30, seed=2)
    whole, part = SuffixDecodingCache(16), SuffixDecodingCache(16)
    for text in first:
        part.add_output(text)
    part.save(tmp_path / "index")
    again = SuffixDecodingCache.open(tmp_path / "index")
    for text in second:
        again.add_output(text)
    again.save(tmp_path / "index")
    for text in [*first, *second]:
        whole.add_output(text)
    contexts = [text[:7] for text in [*first[:20], *second[:20]]]
    opened = SuffixDecodingCache.open(tmp_path / "index")
    assert drafts_of(opened, contexts) == drafts_of(whole, contexts)


def test_what_is_evicted_or_under_way_is_saved_as_it_is(tmp_path: Path) -> None:
    index, expected = SuffixDecodingCache(16), SuffixDecodingCache(16)
    texts = filled(16, 9, tokens=900, seed=3)
    for request, text in enumerate(texts):
        index.start_request(request, [])
        index.add_active_response(request, text)
        if request != 1:
            index.stop_request(request)
    for request in range(0, len(texts), 2):
        index.evict_cached_response(request)
    for request in range(1, len(texts), 2):
        expected.add_output(texts[request])
    index.save(tmp_path / "index")
    opened = SuffixDecodingCache.open(tmp_path / "index")
    contexts = [text[:8] for text in texts]
    scores = [
        [sum(found[2]) for found in drafts_of(cache, contexts)][1::2]
        for cache in (opened, expected)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # trees: whatever the order of equals


def test_an_empty_index(tmp_path: Path) -> None:
    SuffixDecodingCache(16).save(tmp_path / "index")
    opened = SuffixDecodingCache.open(tmp_path / "index")
    assert drafts_of(opened, [np.array([1, 2, 3])]) == [([], [], [], 0)] * 2


def test_a_broken_file_is_refused_by_name_or_the_one_before_it_opens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "index"
    index = SuffixDecodingCache(16)
    for text in filled(16, 30):
        index.add_output(text)
    index.save(path, tokenizer="abc")
    good = path.read_bytes()
    SuffixDecodingCache.open(path, tokenizer="abc")
    with pytest.raises(ValueError, match=r"index holds ids of another tokenizer \(abc"):
        SuffixDecodingCache.open(path, tokenizer="xyz")
    broken = {
        "is cut off": good[: len(good) // 2],
        "header is cut off": good[:100],
        "has another checksum": good[:-3000] + bytes([good[-3000] ^ 1]) + good[-2999:],
        "is damaged": good[:40] + b"?" + good[41:],
        "is no suffix index": b"something else",
        "it has 0 bytes": b"",
    }
    for why, content in broken.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name} .*{why}"):
            SuffixDecodingCache.open(path)
    path.write_bytes(good)
    index.add_output([1, 2, 3])
    index.save(path)
    assert previous(path).read_bytes() == good
    path.write_bytes(path.read_bytes()[:1000])  # a crash of the file system
    opened = SuffixDecodingCache.open(path)
    assert "index.previous is taken instead" in capsys.readouterr().err
    assert drafts_of(opened, [filled(16, 30)[0][:5]])[0][0]
    path.unlink()  # killed between the two renames
    SuffixDecodingCache.open(path)
    previous(path).unlink()
    with pytest.raises(FileNotFoundError):
        SuffixDecodingCache.open(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = SuffixDecodingCache(16)
    index.add_output([1, 2, 3, 1, 2])
    index.save(tmp_path / "index")
    before = (tmp_path / "index").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        index.save(tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert (tmp_path / "index").read_bytes() == before


def test_ids_that_nobody_has_are_asked_for(tmp_path: Path) -> None:
    index = SuffixDecodingCache(16)
    index.add_output([1, 2, 3, 1, 2])
    contexts = [np.array([1, 2, -1]), np.array([-1, 1, 2]), np.array([5, 7]), np.array([9, 10**9])]
    index.save(tmp_path / "index")
    for cache in (index, SuffixDecodingCache.open(tmp_path / "index")):
        found = drafts_of(cache, contexts)
        assert [tokens for tokens, *_ in found] == [[], [], [3, 1, 2], [3, 1, 2], [], [], [], []]


def test_counts_above_16_bits_survive(tmp_path: Path) -> None:
    index = SuffixDecodingCache(3)
    index.add_output(np.tile([1, 2, 1, 3, 1, 2], 25_000))
    contexts = [np.array([3, 1]), np.array([5, 2, 1])]
    expected = drafts_of(index, contexts)
    index.save(tmp_path / "index")
    assert drafts_of(SuffixDecodingCache.open(tmp_path / "index"), contexts) == expected
    assert expected[0][2][0] < 0.7


def test_compiled_code_is_kept_where_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept = Path(cache_folder.__wrapped__())
    assert kept.parent == tmp_path / "cache" / "draftsmith"
    assert cache_folder.__wrapped__() == str(kept)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    alone = Path(cache_folder.__wrapped__())
    assert alone.is_dir()
    assert cache_folder.__wrapped__() != str(alone)  # nobody else's


def test_a_process_without_a_place_to_keep_code_leaves_none_behind(tmp_path):
    code = (
        "import os; from decode.suffix.compiled import cache_folder as f; assert os.path.isdir(f())"
    )
    places = {"XDG_CACHE_HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=os.environ | places, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(4))
def test_continuations_are_the_most_frequent_by_counting(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(30))] for _ in range(8)]
    cache = SuffixDecodingCache(max_tree_depth=9)
    for text in texts:
        cache.add_output(text)
    cache.save(tmp_path / "index")
    counts = ByCounting(9).count(texts)
    found = 0
    for _ in range(60):
        context = [rng.randrange(3) for _ in range(8)]
        match = next(
            tuple(context[-size:])
            for size in (5, 4, 3, 2, 1)
            if any(counts[(*context[-size:], token)] for token in range(3))
        )
        below = [s for s in counts if s[: len(match)] == match and 0 < len(s) - len(match) <= 4]
        wanted = sorted((counts[string] for string in below), reverse=True)[:12]
        for index in (cache, SuffixDecodingCache.open(tmp_path / "index")):
            draft = index.continuations(context, longest=5, length=4, max_tokens=12)
            strings = {-1: match}
            for node, (token, parent) in enumerate(
                zip(draft.token_ids, draft.parents, strict=True)
            ):
                strings[node] = (*strings[parent], token)
            assert draft.match_len == len(match)
            assert len(set(strings.values())) == len(strings)
            assert [counts[strings[node]] for node in range(len(wanted))] == wanted
        found += len(wanted)
    assert found > 300
