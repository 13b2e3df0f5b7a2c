"""Forwards of one sequence, compiled by torch: fused kernels, and on a GPU one launch for all.

What is compiled is the forward that `CachedModel` has anyway, the lean one or the model's modules,
over views of the cache. Two variants do for every step: one token, and any number of them from two
on. Whatever does not fit (several sequences, prompts) takes the uncompiled forward, as does a model
whose compiled forward fails or gives other numbers when both are tried.

Shape legend: N tokens, L keys, G key heads, E size of a head, V vocabulary, D hidden.
"""

import functools
import itertools
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from decode.cache import SlotCache, Window
from decode.suffix.compiled import kept_folder

MAX_WIDTH = 64  # wider forwards are prompts
MAX_VARIANTS = 8  # of layers asked for; each costs seconds
MAX_RECORDINGS = 64  # of slots, widths and numbers of keys, on a GPU; each keeps its outputs
FEWEST_KEYS = 64  # that a recorded forward reads

Masks = Tensor | dict[str, Tensor]
Outputs = tuple[Tensor, dict[int, Tensor]]
Forward = Callable[[Tensor, Masks, Tensor, Cache, tuple[int, ...]], Outputs]


class Inputs(NamedTuple):
    """What a compiled forward reads.

    Attributes:
        tokens: [1, N].
        places: [N], where in the cache their keys go.
        positions: [1, N].
        masks: additive, [1, 1, N, L]; one, or one per kind of layer.
        keys: of each layer, all of the slot's, [1, G, capacity, E]; L of them are read.
        values: likewise.
    """

    tokens: Tensor
    places: Tensor
    positions: Tensor
    masks: Masks
    keys: list[Tensor]
    values: list[Tensor]


Run = Callable[[Inputs], Outputs]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one slot and layer, written at places that are a tensor."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor, num_keys: int):
        self.keys, self.values, self.places, self.num_keys = keys, values, places, num_keys
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the tensors are the cache's."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys.narrow(2, 0, self.num_keys), self.values.narrow(2, 0, self.num_keys)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_keys, 0

    def get_seq_length(self) -> int:
        return 0  # positions are handed in

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class CompiledForward:
    """The compiled forwards of one model over a `SlotCache`, each compiled at its first use."""

    def __init__(self, forward: Forward, cache: SlotCache, *, vocab_size: int, name: str):
        """Compile nothing yet.

        Args:
            forward: of tokens, masks, positions, cache and layers asked for: logits and states.
            cache: keys and values, which have been written to before.
            vocab_size: tokens that there are.
            name: of the model, for messages.
        """
        device = cache.layers[0].keys.device
        self._forward = forward
        self._cache = cache
        self._capacity = cache.capacity
        self._vocab_size = vocab_size
        self._name = name
        self._places = torch.arange(cache.capacity, device=device)
        stores = [layer.slots for layer in cache.layers]
        self._slots = [
            ([slots[slot][0] for slots in stores], [slots[slot][1] for slots in stores])
            for slot in range(cache.num_slots)
        ]
        self._is_on_cpu = device.type == "cpu"
        self._records = device.type == "cuda"
        self._has_failed = False
        self._recordings: dict[tuple[object, ...], Recording] = {}
        # by whether it is one token, and the layers asked for; None where it does not work
        self._variants: dict[tuple[bool, tuple[int, ...]], Run | None] = {}

    def __call__(
        self,
        tokens: Tensor,
        masks: Masks,
        positions: Tensor,
        window: Window,
        layers: tuple[int, ...],
        uncompiled: Callable[[], Outputs],
    ) -> Outputs:
        """Logits [1, N, V], and the states [1, N, D] asked for.

        Args:
            tokens: [1, N].
            masks: additive, [1, 1, N, L]; one, or one per kind of layer.
            positions: [1, N].
            window: the part of the cache that was opened for them.
            layers: hidden states to return.
            uncompiled: the same forward, for what is not compiled.

        Raises:
            IndexError: a token is none of the model's (on a GPU the driver stops instead).
        """
        width = tokens.shape[1]
        if (
            window.slot is None
            or width > MAX_WIDTH
            or window.num_keys < 2  # torch makes a kernel of its own for a single key
            or self._cache.capacity != self._capacity  # grown, and laid out otherwise
        ):
            return uncompiled()
        if self._is_on_cpu:
            refuse_unknown(tokens, self._vocab_size)
        inputs = self._inputs(tokens, masks, positions, window.slot, window)
        variant = (width == 1, layers)
        if variant not in self._variants:
            if self._has_failed or len(self._variants) == MAX_VARIANTS:
                return uncompiled()
            self._variants[variant] = self._tried(inputs, layers, uncompiled)
        run = self._variants[variant]
        if run is None:
            return uncompiled()
        try:
            if self._records:
                run = self._recorded(run, inputs, (window.slot, *variant, *_shape(inputs)))
            return run(inputs)
        except Exception as error:  # torch compiles anew where shapes call for it, within a limit
            self._warn(f"fails once it is compiled ({reason(error)})")
            self._variants[variant] = None
            return uncompiled()

    def _inputs(
        self, tokens: Tensor, masks: Masks, positions: Tensor, slot: int, window: Window
    ) -> Inputs:
        """What the forward reads; for a recording a few more keys, which are masked."""
        num_keys = window.num_keys
        if self._records:
            num_keys = min(rounded_up(num_keys), self._capacity)
            masks = _on_each(lambda mask: padded(mask, num_keys), masks)
        keys, values = self._slots[slot]
        places = self._places.narrow(0, window.starts[0], tokens.shape[1])
        return Inputs(tokens, places, positions, masks, keys, values)

    def _tried(
        self, inputs: Inputs, layers: tuple[int, ...], uncompiled: Callable[[], Outputs]
    ) -> Run | None:
        """The forward for such inputs, compiled, where it works and agrees with `uncompiled`."""
        started = time.perf_counter()
        expected = uncompiled()
        keep_compiled_code()
        try:
            run = compiled(self._forward, layers)
            mark_dynamic(inputs)
            found = run(inputs)
        except Exception as error:  # torch raises many kinds here, and none of them is the user's
            self._warn(f"cannot be compiled ({reason(error)})")
            self._has_failed = True  # other variants would too, after some seconds each
            return None
        if not _agree(found, expected):
            self._warn("gives other numbers once it is compiled")
            return None
        what = "one token" if inputs.tokens.shape[1] == 1 else "several tokens"
        print(
            f"Compiled the forward of {self._name} for {what} in "
            f"{time.perf_counter() - started:.1f} s; this is kept for the next time.",
            file=sys.stderr,
        )
        return run

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"the forward of {self._name} {what}; the uncompiled one is used instead",
            stacklevel=5,
        )

    def _recorded(self, run: Run, inputs: Inputs, key: tuple[object, ...]) -> Run:
        """`run` recorded for such inputs, as long as there are not too many recordings."""
        if key not in self._recordings and len(self._recordings) < MAX_RECORDINGS:
            self._recordings[key] = Recording(run, inputs)
        return self._recordings.get(key, run)


class Recording:
    """A forward for inputs of one shape, recorded on a GPU: its kernels start at one call."""

    def __init__(self, run: Run, inputs: Inputs):
        """Record `run` over copies of what changes in `inputs`; keys and values stay in place."""
        self._inputs = inputs._replace(
            tokens=inputs.tokens.clone(),
            places=inputs.places.clone(),
            positions=inputs.positions.clone(),
            masks=_on_each(torch.clone, inputs.masks),
        )
        self._replay, self._outputs = record(lambda: run(self._inputs))

    def __call__(self, inputs: Inputs) -> Outputs:
        """The outputs, as tensors of their own."""
        for ours, given in zip(_changing(self._inputs), _changing(inputs), strict=True):
            ours.copy_(given)
        self._replay()
        logits, states = self._outputs
        return logits.clone(), {layer: state.clone() for layer, state in states.items()}


@functools.cache
def shared_pool() -> Any:
    """Memory that all recordings share: what one gives is copied before another is replayed."""
    return torch.cuda.graph_pool_handle()


def record(run: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
    """How to run it again over the same tensors, and where its outputs are then."""
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in a first run
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=shared_pool()):
        outputs = run()
    return graph.replay, outputs


def compiled(forward: Forward, layers: tuple[int, ...]) -> Run:
    """`forward` over a slot's keys and values, to be compiled at its first call."""

    def step(
        tokens: Tensor,
        places: Tensor,
        positions: Tensor,
        masks: Masks,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Outputs:
        num_keys = _each(masks)[0].shape[3]
        pairs = zip(keys, values, strict=True)
        layers_of_slot = [_SlotLayer(key, value, places, num_keys) for key, value in pairs]
        cache = Cache(layers=layers_of_slot)
        return forward(tokens, masks, positions, cache, layers)

    # torch keeps compiled code with the code that it was made of: ours must be this model's alone,
    # since the checks that it is the same one, a tenth of a step, are left out.
    # Its name is its own, too: what differs between calls of one name, as the number of heads of
    # two models, would be left open.
    code = step.__code__.replace(co_name=f"step_{next(_numbers)}")
    own = types.FunctionType(code, step.__globals__, code.co_name, None, step.__closure__)
    run = torch.compile(own, fullgraph=True, options={"guard_filter_fn": _shapes_only})
    return lambda inputs: run(*inputs)


def mark_dynamic(inputs: Inputs) -> None:
    """Let the numbers of keys, and of tokens where they are several, be any."""
    for mask in _each(inputs.masks):
        torch._dynamo.mark_dynamic(mask, 3)
    if inputs.tokens.shape[1] > 1:
        torch._dynamo.mark_dynamic(inputs.tokens, 1)
        torch._dynamo.mark_dynamic(inputs.places, 0)
        torch._dynamo.mark_dynamic(inputs.positions, 1)
        for mask in _each(inputs.masks):
            torch._dynamo.mark_dynamic(mask, 2)


def rounded_up(num_keys: int) -> int:
    """A number of keys to record for: from 256 on at most a quarter more, so that they stay few."""
    unit = max(FEWEST_KEYS, (1 << num_keys.bit_length()) // 8)
    return -(-num_keys // unit) * unit


def padded(mask: Tensor, num_keys: int) -> Tensor:
    """A mask [1, 1, N, L] with more keys, which nobody sees."""
    lowest = torch.finfo(mask.dtype).min
    return torch.nn.functional.pad(mask, (0, num_keys - mask.shape[-1]), value=lowest)


def difference(ours: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest magnitude; not a number where one is not.

    Ids that a trimmed head does not have are impossible both ways: -inf - -inf is no number.
    """
    ours, expected = (x.float().nan_to_num(torch.nan, neginf=0.0) for x in (ours, expected))
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def rounding(dtype: torch.dtype) -> float:
    """How much two ways of computing the same may differ, as a share of the largest magnitude."""
    return 1e-4 if dtype == torch.float32 else 5e-2


def refuse_unknown(tokens: Tensor, vocab_size: int) -> None:
    """Raise IndexError for tokens [1, N] that the model does not have, as its embedding would."""
    ids = tokens[0].tolist()
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise IndexError("index out of range in self")


def keep_compiled_code() -> None:
    """Let torch keep what it compiles, unless its user has said where.

    Its own choice is a folder of the system's temporary ones, which do not last.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = kept_folder("torch")


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
        return "no C++ compiler works here: install g++, or name one in the variable CXX"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_numbers = itertools.count()


def _agree(ours: Outputs, expected: Outputs) -> bool:
    pairs = [(ours[0], expected[0])]
    pairs += [(state, expected[1][layer]) for layer, state in ours[1].items()]
    return all(difference(found, known) <= rounding(known.dtype) for found, known in pairs)


def _shapes_only(checks: Sequence[Any]) -> list[bool]:
    """Which of torch's checks are made at every call."""
    return [check.guard_type == "SHAPE_ENV" for check in checks]


def _each(masks: Masks) -> list[Tensor]:
    return [masks] if isinstance(masks, Tensor) else list(masks.values())


def _on_each(change: Callable[[Tensor], Tensor], masks: Masks) -> Masks:
    if isinstance(masks, Tensor):
        return change(masks)
    return {kind: change(mask) for kind, mask in masks.items()}


def _shape(inputs: Inputs) -> tuple[int, ...]:
    """Numbers of tokens and keys."""
    return tuple(_each(inputs.masks)[0].shape[2:])


def _changing(inputs: Inputs) -> list[Tensor]:
    """The tensors that are others at every step."""
    return [inputs.tokens, inputs.places, inputs.positions, *_each(inputs.masks)]
