"""The figures of the steps between two lines of metrics."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.objectives import LossTerms


class Window:
    """Sums and counts since the last line of metrics, on the device; no step waits for them."""

    def __init__(self, accelerator: Accelerator):
        """Nothing is summed yet."""
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}  # name -> [2]: sum, count

    def add(self, terms: LossTerms) -> None:
        """Add the loss and the metrics of a micro-batch."""
        for name, (total, count) in {
            "loss": (terms.loss.detach(), terms.num_tokens),
            **terms.metrics,
        }.items():
            self._add(name, torch.stack([total.double(), count.double()]))

    def add_value(self, name: str, value: Tensor) -> None:
        """Add one value of something that is averaged over steps."""
        self._add(name, torch.stack([value.double(), torch.ones_like(value).double()]))

    def _add(self, name: str, pair: Tensor) -> None:
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def gather(self) -> dict[str, list[float]]:
        """The sums of all processes, which from here on are the main process's."""
        if not self._sums:
            return {}
        stacked = torch.stack(list(self._sums.values()))
        if self._accelerator.num_processes > 1:
            stacked = cast(Tensor, self._accelerator.reduce(stacked, reduction="sum"))
        kept = stacked if self._accelerator.is_main_process else torch.zeros_like(stacked)
        self._sums = dict(zip(self._sums, kept, strict=True))
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Averages over all processes."""
        return {name: total / max(count, 1) for name, (total, count) in self.gather().items()}

    def restore(self, sums: dict[str, list[float]]) -> None:
        """Take up what `gather` gave when the run was stopped."""
        share = 1.0 if self._accelerator.is_main_process else 0.0
        self._sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=self._accelerator.device) * share
            for name, pair in sums.items()
        }

    def clear(self) -> None:
        """Begin anew."""
        self._sums = {}
