"""Drafters that the data make smaller: a checkpoint pruned, a vocabulary trimmed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel

from decode.models import PrunedLM, trim
from distill.batches import Example
from distill.target import LoadedTarget


class DrafterSettings(Protocol):
    """Where a drafter begins; `PrunedLM` besides looks at the data."""

    def build(self, target: PreTrainedModel) -> nn.Module:
        """The model, of one of the families; ValueError where it cannot be made for this target."""
        ...


@dataclass(frozen=True, kw_only=True)
class VocabularySettings:
    """A language model drafts only the ids that the data have most often, and reads all.

    Attributes:
        keep: how many ids its head has, the target's end of text among them. Ids that the data do
            not have are never kept.
    """

    keep: int

    def __post_init__(self) -> None:
        """Refuse heads of nothing."""
        if self.keep < 1:
            raise ValueError(f"keep must be >= 1, got {self.keep}")

    def trim(
        self, drafter: nn.Module, target: LoadedTarget, examples: Sequence[Example]
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The drafter with the smaller head, and what was kept of the vocabulary.

        Raises:
            ValueError: the drafter is no language model whose head can be trimmed.
        """
        if not isinstance(drafter, PreTrainedModel):
            raise ValueError(
                "heads on the target share its vocabulary, only a language model's can be trimmed: "
                "vocabulary=null, or drafter=lm"
            )
        counts = learnt_counts(examples)
        ids = frequent_ids(counts, self.keep, always=end_ids(target))
        learnt = max(counts.total(), 1)
        share = sum(counts[token] for token in ids) / learnt
        size = drafter.config.get_text_config().vocab_size
        return trim(drafter, ids), {"kept": len(ids), "of": size, "share": round(share, 4)}


def begun(
    begin: DrafterSettings,
    vocabulary: VocabularySettings | None,
    target: LoadedTarget,
    examples: Sequence[Example],
) -> tuple[nn.Module, dict[str, Any]]:
    """The drafter before training, and what was kept of what it was made from.

    Raises:
        ValueError: it cannot be made for this target.
    """
    kept: dict[str, Any] = {}
    drafter: nn.Module
    if isinstance(begin, PrunedLM):
        pruned = begin.shrink(target.model, [example.ids for example in examples])
        drafter, kept = pruned.model, dict(pruned.kept)
    else:
        drafter = begin.build(target.model)
    if vocabulary is not None:
        drafter, kept["vocabulary"] = vocabulary.trim(drafter, target, examples)
    return drafter, kept


def learnt_counts(examples: Sequence[Example]) -> Counter[int]:
    """How often each id is to be predicted."""
    counts: Counter[int] = Counter()
    for example in examples:
        pairs = zip(example.ids, example.loss_mask, strict=True)
        counts.update(token for token, is_learnt in pairs if is_learnt)
    return counts


def frequent_ids(counts: Counter[int], keep: int, *, always: Sequence[int]) -> list[int]:
    """The `keep` most frequent ids, ascending, with those of `always`; of ties the smaller ones."""
    others = sorted(counts.keys() - set(always), key=lambda token: (-counts[token], token))
    return sorted({*always, *others[: max(keep - len(always), 0)]})


def end_ids(target: LoadedTarget) -> list[int]:
    """What ends the target's texts."""
    stated = [target.model.generation_config, target.model.config.get_text_config()]
    found = [getattr(config, "eos_token_id", None) for config in stated]
    found.append(target.tokenizer.eos_token_id)
    ids = [token for ends in found for token in (ends if isinstance(ends, list) else [ends])]
    return sorted({int(token) for token in ids if token is not None})


def in_words(kept: Mapping[str, Any]) -> str:
    """One line that says what was kept."""
    names = {
        "hidden_channels": "hidden channels with {} of their energy",
        "feed_forward_channels": "feed-forward channels with {} of their activation",
        "key_heads": "groups of heads with {} of their output",
        "vocabulary": "ids with {} of the learnt tokens",
    }
    parts = []
    if "layers" in kept:
        layers = ", ".join(map(str, kept["layers"]))
        parts.append(f"of {kept['from']} layers {layers} of {kept['of_layers']}")
    for name, words in names.items():
        if name in kept:
            part = kept[name]
            said = words.format(f"{part['share']:.1%}")
            parts.append(f"{part['kept']:,} of {part['of']:,} {said}")
    return "kept " + "; ".join(parts)
