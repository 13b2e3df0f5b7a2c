"""The speculative decoding runtime: any transformers LM, any drafter, exact by test."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decode.cached_model import CachedModel, ModelOutput
    from decode.certificate import Certificate, Mismatch, certify, compare
    from decode.decoder import SpeculativeDecoder
    from decode.draft import Draft
    from decode.int8.linear import quantize_int8
    from decode.layout import lay_out_for_decoding
    from decode.planner import TreePlan, expected_accepted, plan_best_first, plan_without_gaps
    from decode.processors import decoder_prompt
    from decode.protocols import Acceptance, AcceptanceRule, Context, Drafter, Exactness
    from decode.requests import GenerationResult, Request, TopLogprobs
    from decode.sampling import SamplingBatch, SamplingParams
    from decode.stats import GenerationStats, StepRecord, StepTrace
    from decode.target import Target, check_supported
    from decode.tokenizers import check_tokenizers, tokenizer_hash

__all__ = [
    "Acceptance",
    "AcceptanceRule",
    "CachedModel",
    "Certificate",
    "Context",
    "Draft",
    "Drafter",
    "Exactness",
    "GenerationResult",
    "GenerationStats",
    "Mismatch",
    "ModelOutput",
    "Request",
    "SamplingBatch",
    "SamplingParams",
    "SpeculativeDecoder",
    "StepRecord",
    "StepTrace",
    "Target",
    "TopLogprobs",
    "TreePlan",
    "certify",
    "check_supported",
    "check_tokenizers",
    "compare",
    "decoder_prompt",
    "expected_accepted",
    "lay_out_for_decoding",
    "plan_best_first",
    "plan_without_gaps",
    "quantize_int8",
    "tokenizer_hash",
]

_MODULES = (
    "cached_model",
    "certificate",
    "decoder",
    "draft",
    "int8.linear",
    "layout",
    "planner",
    "processors",
    "protocols",
    "sampling",
    "stats",
    "target",
    "tokenizers",
)


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: the suffix index alone needs no torch."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"decode.{module}"), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module 'decode' has no attribute {name!r}")
