"""Properties of any draft tree and of any drafter, on random ones (hypothesis)."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decode import (
    CachedModel,
    Context,
    Draft,
    Drafter,
    Request,
    SamplingParams,
    SpeculativeDecoder,
    Target,
)
from decode.acceptance import (
    KSequence,
    Lenient,
    NearTokens,
    Rollback,
    SpeculativeSampling,
    TopTokens,
    Typical,
)

V = 97
RULES = [
    SpeculativeSampling(),
    KSequence(),
    Lenient(),
    NearTokens(),
    Rollback(),
    TopTokens(),
    Typical(),
]
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def trees(draw: st.DrawFn, *, batch: int = 2, most: int = 9) -> Draft:
    """Trees of 1 to `most` nodes below any earlier node; few tokens, so that siblings repeat."""
    rows, parents, sizes = [], [], []
    for _ in range(batch):
        size = draw(st.integers(1, most))
        rows.append(draw(st.lists(st.integers(0, 5), min_size=most, max_size=most)))
        above = [draw(st.integers(0, node - 1)) for node in range(1, size)]
        parents.append([-1, *above, *range(size - 1, most - 1)])
        sizes.append(size)
    return Draft(torch.tensor(rows), torch.tensor(parents), torch.tensor(sizes))


def path_to(draft: Draft, row: int, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = int(draft.parents[row, node])
    return path[::-1]


@QUICK
@given(trees())
def test_ancestors_depths_and_children_are_what_the_parents_say(draft):
    draft.validate()
    ancestors, depths, children = draft.ancestors(), draft.depths(), draft.children()
    for row in range(2):
        below: dict[int, list[int]] = {}
        for node in range(draft.tokens.shape[1]):
            path = path_to(draft, row, node)
            assert ancestors[row, node].nonzero()[:, 0].tolist() == path
            assert int(depths[row, node]) == len(path) - 1
            if 0 < node < int(draft.num_nodes[row]):
                below.setdefault(path[-2], []).append(node)
        for node in range(draft.tokens.shape[1]):
            found = [child for child in children[row, node].tolist() if child > 0]
            assert found == below.get(node, [])


@QUICK
@given(
    draft=trees(),
    lengths=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    leaf=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    architecture=st.sampled_from(["llama", "gpt2", "mistral", "gemma2"]),
)
def test_a_tree_is_read_and_a_path_committed_as_if_from_scratch(
    tiny, draft, lengths, leaf, architecture
):
    """Logits at every node, and then behind a token that follows the committed path."""
    model = tiny(architecture)
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]
    cached = CachedModel(model, num_slots=3)
    slots = [0, 2]
    with torch.inference_mode():
        for slot, text in zip(slots, texts, strict=True):
            cached.forward([slot], torch.tensor([text]), commit=[len(text)])
        logits = cached.forward(slots, draft.tokens, tree=draft).logits
        paths = []
        for row, text in enumerate(texts):
            for node in range(int(draft.num_nodes[row])):
                path = path_to(draft, row, node)
                tokens = [*text, *draft.tokens[row, path].tolist()]
                expected = model(torch.tensor([tokens])).logits[0, -1]
                torch.testing.assert_close(logits[row, node], expected, atol=2e-4, rtol=1e-3)
            paths.append(path_to(draft, row, min(leaf[row], int(draft.num_nodes[row]) - 1)))
        cached.cache.commit_paths(slots, paths)
        after = cached.forward(slots, torch.tensor([[7], [8]])).logits[:, 0]
        for row, (text, extra) in enumerate(zip(texts, (7, 8), strict=True)):
            kept = draft.tokens[row, paths[row]].tolist()
            expected = model(torch.tensor([[*text, *kept, extra]])).logits[0, -1]
            torch.testing.assert_close(after[row], expected, atol=2e-4, rtol=1e-3)
    cached.cache.check_integrity()


class Garbage(Drafter):
    """Whatever hypothesis comes up with: no tree at all, siblings that repeat, too deep a one."""

    hidden_layers = ()

    def __init__(self, drafts: list[Draft], with_laws: bool):
        self.drafts, self.with_laws, self.step = drafts, with_laws, 0

    def propose(self, context: Context) -> Draft:
        draft = self.drafts[self.step % len(self.drafts)]
        self.step += 1
        rows = torch.arange(len(context.slots)) % len(draft.tokens)
        tokens = torch.cat([torch.tensor(context.roots)[:, None], draft.tokens[rows, 1:]], dim=1)
        laws = None
        if self.with_laws:
            generator = torch.Generator().manual_seed(self.step)
            laws = torch.rand(*tokens.shape, V, generator=generator).softmax(-1)
        return Draft(tokens, draft.parents[rows], draft.num_nodes[rows], laws)


@QUICK
@given(
    drafts=st.lists(trees(most=7), min_size=1, max_size=4),
    rule=st.sampled_from(RULES),
    temperature=st.sampled_from([0.0, 0.7]),
    with_laws=st.booleans(),
    batch=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 96), min_size=1, max_size=4),
)
def test_no_drafter_breaks_the_decoder(
    tiny, greedy, drafts, rule, temperature, with_laws, batch, lengths
):
    """And a sound rule gives the target's own greedy output whatever was drafted."""
    model = tiny("llama")
    target = Target(model, max_batch_size=batch)
    params = SamplingParams(temperature=temperature, max_new_tokens=9)
    generator = torch.Generator().manual_seed(len(lengths))
    prompts = [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]
    requests = [Request(id=str(n), prompt=p, sampling=params) for n, p in enumerate(prompts)]
    decoder = SpeculativeDecoder(target, Garbage(drafts, with_laws), rule)
    for text, result in zip(prompts, decoder.generate(requests), strict=True):
        room = min(9, 96 - len(text))
        assert len(result.tokens) == room
        assert all(0 <= token < V for token in result.tokens)
        if temperature == 0 and isinstance(rule, SpeculativeSampling):
            assert result.tokens == (greedy(model, text, room) if room else [])
    target.cached.cache.check_integrity()
