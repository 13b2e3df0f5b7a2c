"""A checkpoint with fewer layers, narrower: what it activates least is left out.

As in Minitron (Muralidharan et al. 2024, 2407.14679, section 2): a few thousand tokens go through
the model, and of each width the channels with the largest mean activation are kept. Whole groups of
heads go, with the key head that they share, so that a head's size and its rotary angles stay.

Shape legend: D hidden size, F feed-forward channels, H query heads, G key heads, E size of a head.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from decode.models.lm import CheckpointLM, TargetLayersLM, evenly_chosen
from decode.models.trimmed import LLAMA_LIKE, trimmed_head

NORMS = ("input_layernorm", "post_attention_layernorm")
TINY = 1e-300  # instead of no activation at all


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned model.

    Attributes:
        model: float32, a plain transformers model.
        kept: what of, in plain data: for each width how many channels of how many, and the share of
            the activation that they had.
    """

    model: PreTrainedModel
    kept: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PrunedLM:
    """A Llama, Mistral, Qwen2 or Qwen3, made smaller; None keeps all there are.

    Attributes:
        path: a local folder or a hub id; None is the target itself.
        revision: of a hub id.
        num_layers: evenly chosen, as `TargetLayersLM` does.
        hidden_size: hidden channels, the same ones in all layers, by their normed activation.
        intermediate_size: feed-forward channels, in each layer its own, by mean |activation|.
        num_heads: query heads, in each layer its own, by mean |output|; whole groups with their key
            head.
        calibration_tokens: on how many tokens activations are measured.
    """

    path: str | None = None
    revision: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    calibration_tokens: int = 8192

    def __post_init__(self) -> None:
        """Refuse models of nothing."""
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.calibration_tokens < 1:
            raise ValueError(f"calibration_tokens must be >= 1, got {self.calibration_tokens}")

    def shrink(self, target: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Pruned:
        """Prune the checkpoint, or the target, by what it activates on `texts`.

        Args:
            target: the target.
            texts: ids; the first `calibration_tokens` of them are read.

        Raises:
            ValueError: the model is of another kind, smaller than asked for, or there are no texts.
        """
        source = target
        if self.path is not None:
            source = CheckpointLM(path=self.path, revision=self.revision).build(target)
        self._check(source)
        total = source.config.num_hidden_layers
        num_layers = self.num_layers or total
        model = TargetLayersLM(num_layers=num_layers).build(source).to(target.device).eval()
        seen = _Activations(model, texts, self.calibration_tokens)
        widths = self._chosen(model.config, seen)
        return Pruned(
            _cut(model, widths, seen),
            {
                "from": self.path or "the target",
                "layers": evenly_chosen(total, num_layers),
                "of_layers": total,
                **widths.described(seen),
                "calibration_tokens": seen.num_tokens,
            },
        )

    def _check(self, source: PreTrainedModel) -> None:
        """Refuse what is no part of the model."""
        name, config = type(source).__name__, source.config
        if type(source) not in LLAMA_LIKE or trimmed_head(source) is not None:
            kind = name if trimmed_head(source) is None else f"a {name} whose head is trimmed"
            raise ValueError(
                f"{kind} cannot be pruned, only a whole Llama, Mistral, Qwen2 or Qwen3; leave out "
                "layers (drafter=lm_from_target) or begin from scratch (drafter=lm)"
            )
        sizes = {
            "hidden_size": (self.hidden_size, config.hidden_size),
            "intermediate_size": (self.intermediate_size, config.intermediate_size),
            "num_heads": (self.num_heads, config.num_attention_heads),
        }
        for size, (wanted, there) in sizes.items():
            if wanted is not None and wanted > there:
                raise ValueError(f"{size}={wanted}: this {name} has {there}")
        per_group = _heads_per_group(config)
        if self.num_heads is not None and self.num_heads % per_group:
            raise ValueError(
                f"num_heads={self.num_heads} are not whole groups: {per_group} query heads share a "
                f"key head in this {name}"
            )

    def _chosen(self, config: Any, seen: "_Activations") -> "_Widths":
        """The channels with the largest activation."""
        num_groups = None if self.num_heads is None else self.num_heads // _heads_per_group(config)
        return _Widths(
            hidden=_largest(seen.hidden, self.hidden_size),
            feed_forward=[_largest(of_layer, self.intermediate_size) for of_layer in seen.channels],
            groups=[_largest(of_layer, num_groups) for of_layer in seen.groups],
        )


@dataclass(frozen=True, slots=True)
class _Widths:
    """Which channels are kept, ascending.

    Attributes:
        hidden: of D.
        feed_forward: per layer, of F.
        groups: per layer, of G.
    """

    hidden: Tensor
    feed_forward: list[Tensor]
    groups: list[Tensor]

    def described(self, seen: "_Activations") -> dict[str, Any]:
        """How many of how many, and their share of the activation, in the mean over layers."""
        hidden = [self.hidden] * len(seen.energies)
        return {
            "hidden_channels": _share(list(seen.energies.values()), hidden),
            "feed_forward_channels": _share(seen.channels, self.feed_forward),
            "key_heads": _share(seen.groups, self.groups),
        }


class _Activations:
    """What a model activates on texts, summed over their first tokens, in float64.

    Attributes:
        hidden: [D] |output| of all norms together.
        channels: per layer [F], |input| of the last feed-forward product.
        groups: per layer [G], |input| of the attention's output product.
        energies: norm -> [D] squared input.
        num_tokens: how many tokens that was.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Sequence[int]], limit: int):
        """Let the first `limit` tokens of the texts through, text by text."""
        config = model.config
        per_layer = range(config.num_hidden_layers)
        size = config.num_attention_heads * _head_size(config)
        self.hidden = torch.zeros(config.hidden_size, dtype=torch.float64, device=model.device)
        self.channels = [self.hidden.new_zeros(config.intermediate_size) for _ in per_layer]
        self.energies: dict[str, Tensor] = {}
        self.num_tokens = 0
        self._attended = [self.hidden.new_zeros(size) for _ in per_layer]
        hooks = [module.register_forward_hook(note) for module, note in self._watched(model)]
        try:
            self._read(model, texts, limit)
        finally:
            for hook in hooks:
                hook.remove()
        num_groups = config.num_key_value_heads
        self.groups = [attended.view(num_groups, -1).sum(-1) for attended in self._attended]

    @torch.no_grad()
    def _read(self, model: PreTrainedModel, texts: Sequence[Sequence[int]], limit: int) -> None:
        context = model.config.max_position_embeddings
        for text in texts:
            ids = list(text)[: min(context, limit - self.num_tokens)]
            if ids:
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                self.num_tokens += len(ids)
        if self.num_tokens == 0:
            raise ValueError("there is no text to measure activations on")

    def _watched(self, model: PreTrainedModel) -> list[tuple[nn.Module, Callable[..., None]]]:
        """The modules, and what is noted of each of their calls."""

        def inputs_of(total: Tensor) -> Callable[..., None]:
            def note(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
                total.add_(given[0].double().abs().flatten(0, -2).sum(0))

            return note

        def norm(name: str) -> Callable[..., None]:
            self.energies[name] = torch.zeros_like(self.hidden)

            def note(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
                self.energies[name] += given[0].double().square().flatten(0, -2).sum(0)
                self.hidden += output.double().abs().flatten(0, -2).sum(0)

            return note

        backbone: Any = model.base_model
        watched = [(backbone.norm, norm("model.norm"))]
        for number, layer in enumerate(backbone.layers):
            watched += [
                (getattr(layer, name), norm(f"model.layers.{number}.{name}")) for name in NORMS
            ]
            watched.append((layer.mlp.down_proj, inputs_of(self.channels[number])))
            watched.append((layer.self_attn.o_proj, inputs_of(self._attended[number])))
        return watched


def _cut(model: PreTrainedModel, widths: _Widths, seen: _Activations) -> PreTrainedModel:
    """The model with these channels only."""
    config, hidden = model.config, widths.hidden
    before, head_size, per_group = config.hidden_size, _head_size(config), _heads_per_group(config)
    smaller = copy.deepcopy(config)
    smaller.hidden_size = len(hidden)
    smaller.intermediate_size = len(widths.feed_forward[0])
    smaller.num_key_value_heads = len(widths.groups[0])
    smaller.num_attention_heads = len(widths.groups[0]) * per_group
    smaller.head_dim = head_size
    # A norm divides by the root of the mean square, of fewer channels now: see `_norm_scale`.
    smaller.rms_norm_eps = config.rms_norm_eps * before / len(hidden)

    weights = {}
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        part = module.rpartition(".")[2]
        if module in seen.energies:
            weights[name] = weight[hidden] * _norm_scale(seen.energies[module], hidden)
            continue
        if part in ("embed_tokens", "lm_head"):
            weights[name] = weight[:, hidden]
            continue
        number = int(module.removeprefix("model.layers.").partition(".")[0])
        groups, channels = widths.groups[number], widths.feed_forward[number]
        queries, keys = _places(groups, per_group * head_size), _places(groups, head_size)
        cuts = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (channels, hidden),
            "up_proj": (channels, hidden),
            "down_proj": (hidden, channels),
        }
        if part in cuts:
            rows, columns = cuts[part]
            weight = weight[rows] if kind == "bias" else weight[rows][:, columns]
        weights[name] = weight  # the norms of single heads stay
    with torch.random.fork_rng():  # transformers draws weights
        cut = type(model)(smaller).float()
    cut.load_state_dict(weights)
    return cut


def _norm_scale(energy: Tensor, kept: Tensor) -> float:
    """What makes a norm over the kept channels as large as the one over all, on average.

    Over D channels it divides by sqrt(Σ x² / D); over K, of which the share s of Σ x² is kept, by
    sqrt(s Σ x² / K). Where the others are always zero the result is the same for every token.
    """
    share = float(energy[kept].sum() / energy.sum())
    return math.sqrt(share * len(energy) / len(kept))


def _largest(activation: Tensor, count: int | None) -> Tensor:
    """The `count` largest, ascending; of equal ones the first."""
    order = activation.argsort(descending=True, stable=True)
    return order[:count].sort().values


def _share(activations: Sequence[Tensor], kept: Sequence[Tensor]) -> dict[str, Any]:
    shares = [
        float(seen[of].sum() / seen.sum().clamp(min=TINY))
        for seen, of in zip(activations, kept, strict=True)
    ]
    share = round(sum(shares) / len(shares), 4)
    return {"kept": len(kept[0]), "of": len(activations[0]), "share": share}


def _places(groups: Tensor, size: int) -> Tensor:
    """The rows of these groups, `size` each."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def _head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _heads_per_group(config: Any) -> int:
    return int(config.num_attention_heads // config.num_key_value_heads)
