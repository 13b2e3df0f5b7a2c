"""The suffix index stands in for arctic-inference in vLLM's suffix method."""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decode.suffix import SuffixDecodingCache, SuffixDraft, install_for_vllm

ROOT = Path(__file__).parents[2]
NAMES = ("arctic_inference", "arctic_inference.suffix_decoding")
INSTALLED = importlib.util.find_spec(NAMES[0]) is not None
needs_arctic = pytest.mark.skipif(not INSTALLED, reason="arctic-inference is not installed")

# What arctic-inference 0.3.0 offers: parameters and their defaults.
NEEDED: dict[str, dict[str, Any]] = {
    "__init__": {"max_tree_depth": 64, "max_cached_requests": -1},
    "start_request": {"req_id": ..., "prompt_token_ids": ...},
    "stop_request": {"req_id": ...},
    "add_active_response": {"req_id": ..., "token_ids": ...},
    "evict_cached_response": {"req_id": ...},
    "speculate": {
        "req_id": ...,
        "context": ...,
        "max_spec_tokens": None,
        "max_spec_factor": 1.0,
        "max_spec_offset": 0.0,
        "min_token_prob": 0.1,
        "use_tree_spec": False,
    },
}
PROPERTIES = {"max_tree_depth", "max_cached_requests", "active_requests", "cached_requests"}
FIELDS = {"token_ids": [], "parents": [], "probs": [], "score": 0.0, "match_len": 0}


def parameters(method: Any) -> dict[str, Any]:
    """Names and defaults, in their order."""
    found = list(inspect.signature(method).parameters.values())[1:]
    return {p.name: ... if p.default is p.empty else p.default for p in found}


def defaults(draft: Any) -> dict[str, Any]:
    """The fields of a draft that nothing was found for."""
    return {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}


def test_every_call_of_the_reference_can_be_made() -> None:
    for name, wanted in NEEDED.items():
        ours = list(parameters(getattr(SuffixDecodingCache, name)).items())
        assert ours[: len(wanted)] == list(wanted.items()), name  # by position too
        assert all(default is not ... for _, default in ours[len(wanted) :])
    for name in PROPERTIES:
        assert isinstance(vars(SuffixDecodingCache)[name], property)
    assert list(defaults(SuffixDraft()).items())[: len(FIELDS)] == list(FIELDS.items())


@needs_arctic
def test_the_reference_is_as_it_was_written_down() -> None:
    reference = importlib.import_module(NAMES[1])
    public = {
        name: value
        for name, value in vars(reference.SuffixDecodingCache).items()
        if not name.startswith("_") or name == "__init__"
    }
    assert {n: parameters(m) for n, m in public.items() if inspect.isfunction(m)} == NEEDED
    assert {n for n, p in public.items() if isinstance(p, property)} == PROPERTIES
    assert list(defaults(reference.SuffixDecodingDraft()).items()) == list(FIELDS.items())
    assert sorted(reference.__all__) == ["SuffixDecodingCache", "SuffixDecodingDraft"]


@pytest.mark.parametrize("name", ["ours", pytest.param("reference", marks=needs_arctic)])
def test_what_the_calls_mean(name: str) -> None:
    if name == "ours":
        cache: Any = SuffixDecodingCache(16, 2)
    else:
        cache = importlib.import_module(NAMES[1]).SuffixDecodingCache(16, 2)
    assert (cache.max_tree_depth, cache.max_cached_requests) == (16, 2)
    active, cached = cache.active_requests, cache.cached_requests  # views, not copies
    cache.start_request("a", np.array([1, 2, 3], dtype=np.int32))
    cache.add_active_response("a", [4, 1, 2])
    assert (list(active), list(cached)) == (["a"], ["a"])
    assert active - {"b": 0}.keys() == {"a"}
    draft = cache.speculate("a", [4, 1, 2], max_spec_tokens=8)
    assert (draft.token_ids, draft.parents, draft.probs) == (
        [3, 4],
        [-1, 0],
        [0.5, 0.5],
    )  # one of two went on
    assert (draft.score, draft.match_len) == (1.0, 2)
    assert cache.speculate("a", [4, 1, 2], max_spec_tokens=0).token_ids == []
    with pytest.raises(ValueError, match=r"'a' is (already active|active already)"):
        cache.start_request("a", [1])
    for call in (
        lambda: cache.stop_request("b"),
        lambda: cache.evict_cached_response("b"),
        lambda: cache.add_active_response("b", [1]),
        lambda: cache.speculate("b", [1]),
    ):
        with pytest.raises(ValueError, match="'b' is not"):
            call()
    cache.evict_cached_response("a")  # while it is active
    cache.add_active_response("a", [9])
    assert (list(active), list(cached)) == (["a"], [])
    cache.stop_request("a")
    cache.start_request("a", [1, 2])  # under the same name
    cache.stop_request("a")
    for request in ("b", "c"):
        cache.start_request(request, [1, 2])
        cache.stop_request(request)
    assert (list(active), list(cached)) == ([], ["b", "c"])  # the oldest has gone


@pytest.fixture
def without_arctic() -> Iterator[None]:
    """A process that has not imported arctic-inference; afterwards it is as it was."""
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


class Serving:
    """What vLLM's suffix proposer does in a step, in its order."""

    def __init__(self, *, longest: int = 200) -> None:
        cls = importlib.import_module(NAMES[1]).SuffixDecodingCache
        self.cache = cls(max_tree_depth=24, max_cached_requests=10_000)
        self.longest = longest

    def propose(self, batch: dict[str, np.ndarray], prompts: dict[str, int]) -> list[list[int]]:
        """Drafts for sequences, by name, of which so many tokens are the prompt."""
        drafts = []
        for name, tokens in batch.items():
            new = tokens[prompts[name] :]
            if name in self.cache.active_requests:
                new = new[-1:]
            else:
                if name in self.cache.cached_requests:
                    self.cache.evict_cached_response(name)
                self.cache.start_request(name, tokens[: prompts[name]])
            self.cache.add_active_response(name, new.tolist())
            draft = self.cache.speculate(
                name,
                tokens[max(0, len(tokens) - 24) :],
                max_spec_tokens=min(24, self.longest - len(tokens) - 1),
                max_spec_factor=1.0,
                min_token_prob=0.1,
            )
            drafts.append(draft.token_ids)
        for name in self.cache.active_requests - batch.keys():
            self.cache.stop_request(name)
        return drafts


@pytest.mark.usefixtures("without_arctic")
def test_the_suffix_method_of_vllm_runs_on_it() -> None:
    assert install_for_vllm(replace=True)
    assert importlib.util.find_spec(NAMES[0]) is not None  # what vLLM asks first
    serving = Serving()
    assert isinstance(serving.cache, SuffixDecodingCache)
    text = np.arange(60, dtype=np.int32)
    first = serving.propose({"a": text[:31]}, {"a": 30})
    assert first == [[]]
    for end in range(32, 61):
        serving.propose({"a": text[:end]}, {"a": 30})
    asking = np.concatenate([text[40:43] + 1000, text[35:40]]).astype(np.int32)
    both = {"b": asking, "a": np.append(text, text[30])}
    drafts = serving.propose(both, {"b": 3, "a": 30})
    assert drafts[0] == [40, 41, 42, 43, 44]  # of five tokens that "a" wrote, five go on
    assert list(serving.cache.active_requests) == ["a", "b"]
    serving.propose({"b": np.append(asking, np.int32(40))}, {"b": 3})
    assert list(serving.cache.active_requests) == ["b"]
    assert list(serving.cache.cached_requests) == ["a", "b"]
    again = serving.propose({"a": text[:31], "b": asking}, {"a": 30, "b": 3})
    assert len(again) == 2  # the same name once more: what it wrote is forgotten
    assert list(serving.cache.cached_requests) == ["b", "a"]


@pytest.mark.usefixtures("without_arctic")
def test_as_a_plug_in_it_stands_in_only_where_arctic_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (plug_in,) = project["entry-points"]["vllm.general_plugins"].values()
    module, _, name = plug_in.partition(":")
    install = getattr(importlib.import_module(module), name)
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        (tmp_path / "arctic_inference").mkdir()
        (tmp_path / "arctic_inference" / "__init__.py").write_text("real = True\n")
        assert not install()
        assert NAMES[1] not in sys.modules
        assert install(replace=True)
        assert importlib.import_module(NAMES[1]).SuffixDecodingCache is SuffixDecodingCache
        assert importlib.import_module(NAMES[0]).real
        for known in NAMES:
            del sys.modules[known]
    if not INSTALLED:
        assert install()
        assert install()  # vLLM may call it more than once in a process
        assert importlib.import_module(NAMES[1]).SuffixDecodingDraft is SuffixDraft
