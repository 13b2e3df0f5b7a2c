"""Several drafters, one tree: what any of them proposes is verified together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from decode.draft import Draft
from decode.protocols import Acceptance, Context, Drafter


class MergedDrafter(Drafter):
    """The union of several drafters' trees: SpecInfer (Miao et al. 2023), merge-based trees.

    Tokens that follow the same path are one node. The drafts must have been chosen with certainty,
    as those of greedy sequences and of the likeliest children are: one tree has one law per node.
    """

    def __init__(self, drafters: Sequence[Drafter]):
        """Draft with all of `drafters`, the first one's nodes first."""
        if not drafters:
            raise ValueError("there is no drafter to merge")
        self.drafters = list(drafters)
        layers = {layer for drafter in drafters for layer in drafter.hidden_layers}
        self.hidden_layers = tuple(sorted(layers))
        self._drafts: list[Draft] = []
        # For each drafter and row: the node of the merged tree that each of its own became.
        self._places: list[list[list[int]]] = []

    def consult(self, slot: int, material: Sequence[int]) -> None:
        """Let each know the text beside the prompt."""
        for drafter in self.drafters:
            drafter.consult(slot, material)

    def begin(self, slot: int, prompt: Tensor, hidden: Mapping[int, Tensor]) -> None:
        """A sequence enters `slot`."""
        for drafter in self.drafters:
            drafter.begin(slot, prompt, hidden)

    def propose(self, context: Context) -> Draft:
        """The union of the drafters' trees.

        Raises:
            ValueError: a draft was drawn at random.
        """
        self._drafts = [drafter.propose(context) for drafter in self.drafters]
        for drafter, draft in zip(self.drafters, self._drafts, strict=True):
            if draft.probs is not None:
                raise ValueError(
                    f"{type(drafter).__name__} draws its drafts at this temperature; only drafts "
                    "chosen with certainty can be merged, such as trees of the likeliest children"
                )
        roots = context.roots
        tokens: list[list[int]] = [[] for _ in roots]
        parents: list[list[int]] = [[] for _ in roots]
        known: list[dict[tuple[int, int], int]] = [{} for _ in roots]  # (above, token) -> node
        self._places = []
        for draft in self._drafts:
            own_tokens, own_parents = draft.tokens.tolist(), draft.parents.tolist()
            places = []
            for row, num_nodes in enumerate(draft.num_nodes.tolist()):
                place = [0]
                for node in range(1, num_nodes):
                    key = place[own_parents[row][node]], own_tokens[row][node]
                    if key not in known[row]:
                        parents[row].append(key[0])
                        tokens[row].append(key[1])
                        known[row][key] = len(tokens[row])
                    place.append(known[row][key])
                places.append(place)
            self._places.append(places)
        return Draft.from_lists(roots, tokens, parents, device=self._drafts[0].tokens.device)

    def observe(
        self, context: Context, draft: Draft, acceptance: Acceptance, target_logits: Tensor
    ) -> None:
        """Tell each drafter what was accepted of its own tree."""
        if draft.tokens.shape[1] == 1 or not self._drafts:  # a prompt's own forward
            alone = Draft.chain(draft.tokens[:, :1])
            for drafter in self.drafters:
                drafter.observe(context, alone, _of_own(alone, acceptance, None), target_logits)
            return
        for drafter, own, places in zip(self.drafters, self._drafts, self._places, strict=True):
            nodes = torch.zeros_like(own.tokens)  # of the merged tree; padding is the root again
            for row, there in enumerate(places):
                nodes[row, : len(there)] = torch.tensor(there)
            logits = target_logits.take_along_dim(nodes[:, :, None], dim=1)
            drafter.observe(context, own, _of_own(own, acceptance, places), logits)
        self._drafts = []

    def end(self, slot: int, output: Sequence[int]) -> None:
        """The sequence in `slot` is finished."""
        for drafter in self.drafters:
            drafter.end(slot, output)

    def learn(self, output: Sequence[int]) -> None:
        """Show a finished output to those who learn from outputs."""
        for drafter in self.drafters:
            if learn := getattr(drafter, "learn", None):
                learn(output)

    def forget(self) -> None:
        """Let those who learn begin anew; no sequence may be under way."""
        for drafter in self.drafters:
            if forget := getattr(drafter, "forget", None):
                forget()


def _of_own(own: Draft, merged: Acceptance, places: list[list[int]] | None) -> Acceptance:
    """What was accepted of one drafter's tree, as far down as the accepted path is its own."""
    paths = []
    for row, nodes in enumerate(merged.paths):
        here = {place: node for node, place in enumerate(places[row])} if places else {}
        path = [0]
        for node in nodes[1:]:
            if node not in here:
                break
            path.append(here[node])
        paths.append(path)
    # A drafter does not see which of its tokens were tried: those accepted, and one more.
    sizes = own.num_nodes.tolist()
    tried = [min(len(path), size - 1) for path, size in zip(paths, sizes, strict=True)]
    return Acceptance(paths, merged.next_tokens, tried)
