"""No draft: autoregressive decoding is speculation with an empty draft, the honest baseline."""

from dataclasses import dataclass, field

from decode.draft import Draft
from decode.drafters.chain import Chains
from decode.protocols import Context, Drafter


@dataclass(frozen=True)
class NoDrafter(Drafter):
    """Proposes the root alone."""

    hidden_layers: tuple[int, ...] = ()
    _chains: Chains = field(default_factory=Chains, init=False, repr=False, compare=False)

    def propose(self, context: Context) -> Draft:
        """The last committed token and nothing behind it."""
        return self._chains.begin(context.roots, 1).draft
