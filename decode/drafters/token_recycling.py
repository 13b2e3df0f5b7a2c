"""What the target thought likely behind each token, also in rejected drafts, is drafted again."""

import numpy as np
from torch import Tensor

from decode.draft import Draft
from decode.planner import TreePlan, plan_best_first
from decode.protocols import Acceptance, Context, Drafter


class TokenRecyclingDrafter(Drafter):
    """Token Recycling (Luo et al. 2024): a table of likely successors, a tree of fixed shape.

    For every token the table holds the likeliest next tokens where the target last saw it, whatever
    stood before. Each verification renews it at all nodes of the draft. Some 2 MB, no training.
    """

    hidden_layers: tuple[int, ...] = ()

    def __init__(self, plan: TreePlan, *, vocab_size: int):
        """Draft trees of `plan`; where the table has no successor its branch ends."""
        self.plan = plan
        self.width = max(plan.ranks, default=0) + 1
        self.vocab_size = vocab_size
        self.forget()

    def forget(self) -> None:
        """Begin with an empty table."""
        self.table = np.full((self.vocab_size, self.width), -1, dtype=np.int64)

    def propose(self, context: Context) -> Draft:
        """Trees as deep as `context.room` allows."""
        plan, roots = self.plan, context.roots
        shape = list(zip(plan.parents, plan.ranks, plan.depths, strict=True))
        tokens, parents = [], []
        for root, room in zip(roots, context.room, strict=True):
            places = {0: 0}  # node of the plan -> node of this tree
            own, above = [root], []
            for node, (parent, rank, depth) in enumerate(shape, start=1):
                if parent not in places or depth > room:
                    continue
                token = int(self.table[own[places[parent]], rank])
                if token >= 0:
                    places[node] = len(own)
                    own.append(token)
                    above.append(places[parent])
            tokens.append(own[1:])
            parents.append(above)
        return Draft.from_lists(roots, tokens, parents)

    def observe(
        self, context: Context, draft: Draft, acceptance: Acceptance, target_logits: Tensor
    ) -> None:
        """Renew the table at every node."""
        seen = draft.valid
        likeliest = target_logits[seen].topk(self.width, dim=-1).indices
        self.table[draft.tokens[seen].cpu().numpy()] = likeliest.cpu().numpy()


def spreading(size: int, depth: int, width: int) -> TreePlan:
    """A plan for acceptance that halves with every rank: most nodes near the likeliest path."""
    profile = [0.45 * 0.5**rank for rank in range(width)]
    return plan_best_first(profile, budget=size, depth=depth)
