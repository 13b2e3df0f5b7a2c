"""What a generation config asks to be done to the logits: applied, or refused, never left out."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

# What leaves the logits as they are; anything else is refused, as it would change the output.
NEUTRAL = {
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
}


def refuse_processors(model: PreTrainedModel) -> None:
    """Raise ValueError for logits processors that would be left out: that changes the output."""
    settings = _settings(model)
    applied = {"bad_words_ids"} if banned_tokens(model) is not None else set()
    if forced_eos(model) is not None:
        applied.add("forced_eos_token_id")
    if model.config.is_encoder_decoder and isinstance(settings.get("forced_bos_token_id"), int):
        applied.add("forced_bos_token_id")
    active = [
        name
        for name, neutral in NEUTRAL.items()
        if settings.get(name) not in (None, neutral) and name not in applied
    ]
    if active:
        raise ValueError(
            f"the generation config of {model.config._name_or_path or type(model).__name__} asks "
            f"for {', '.join(f'{name}={settings[name]!r}' for name in active)}, which this runtime "
            f"does not apply; to decode without, take it out of generation_config.json, or set "
            f"model.generation_config.{active[0]} = None"
        )


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an output."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, Sequence) else frozenset([eos])


def repetition_penalty(model: PreTrainedModel) -> float:
    """The penalty of requests that name none."""
    penalty = _settings(model).get("repetition_penalty")
    return 1.0 if penalty is None else float(penalty)  # type: ignore[arg-type]


def banned_tokens(model: PreTrainedModel) -> list[int] | None:
    """Tokens that are never written: `bad_words_ids` of one token each, but for EOS.

    None where there are none, or where a bad word has several tokens.
    """
    words = _settings(model).get("bad_words_ids")
    if not words or any(len(word) != 1 for word in words):  # type: ignore[attr-defined]
        return None
    return sorted({word[0] for word in words} - eos_token_ids(model))  # type: ignore[attr-defined]


def forced_eos(model: PreTrainedModel) -> int | None:
    """The last token of an output that reaches its limit, where one is given."""
    forced = _settings(model).get("forced_eos_token_id")
    if isinstance(forced, Sequence) and len(forced) == 1:
        forced = forced[0]
    return forced if isinstance(forced, int) else None


def decoder_prompt(model: PreTrainedModel, given: Sequence[int] = ()) -> list[int]:
    """What the decoder of an encoder-decoder model begins with; nothing of other models.

    That is `given`, or else the start token; and behind a single token the BOS that is forced, as
    in transformers.

    Raises:
        ValueError: nothing is given, and the model names no start token.
    """
    if not model.config.is_encoder_decoder:
        return []
    settings = _settings(model)
    prompt = list(given)
    if not prompt:
        start = settings.get("decoder_start_token_id")
        if start is None:
            start = settings.get("bos_token_id")
        if not isinstance(start, int):  # a list has one for each row of a batch
            raise ValueError(
                f"the generation config of {type(model).__name__} names no one "
                "decoder_start_token_id to begin with; give the request a prompt"
            )
        prompt = [start]
    forced = settings.get("forced_bos_token_id")
    if len(prompt) == 1 and isinstance(forced, int):
        prompt.append(forced)
    return prompt


def _settings(model: PreTrainedModel) -> Mapping[str, object]:
    return model.generation_config.to_dict() if model.generation_config else {}
