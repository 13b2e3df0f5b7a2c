"""No draft: autoregressive decoding is speculation with an empty draft, the honest baseline."""

from dataclasses import dataclass

from decode.draft import Draft
from decode.protocols import Context, Drafter


@dataclass(frozen=True)
class NoDrafter(Drafter):
    """Proposes the root alone."""

    hidden_layers: tuple[int, ...] = ()

    def propose(self, context: Context) -> Draft:
        """The last committed token and nothing behind it."""
        return Draft.chain(context.roots)
