"""The model card of an exported drafter: what it is, and what was measured."""

from collections.abc import Mapping
from typing import Any

CARD = """\
---
library_name: transformers
tags: [speculative-decoding, draft-model, draftsmith]
---

# Drafter for {target}

An independent draft model for speculative decoding with the target `{target}`, trained by
[Draftsmith](https://pypi.org/project/draftsmith/). It shares the target's tokenizer and vocabulary
size ({vocab_size:,}), and has {parameters:,} parameters ({dtype}).

## Use

```python
target.generate(**inputs, assistant_model=AutoModelForCausalLM.from_pretrained("{folder}"))
```

```sh
vllm serve {target} --speculative-config \\
  '{{"method": "draft_model", "model": "{folder}", "num_speculative_tokens": {draft_length}}}'
draftsmith evaluate target.path={target} drafters.mine={folder}
```

## How it was made

| | |
| --- | --- |
{facts}

## What was measured

{measured}

Speculative decoding with a lossless rule leaves the target's output as it is, whatever the drafter:
these figures say how much faster it comes, not how good it is.
"""


def model_card(description: Mapping[str, Any], measured: str) -> str:
    """The card's text.

    Args:
        description: the drafter's `draftsmith.json`.
        measured: a Markdown passage with the figures.
    """
    skipped = {"family", "measured", "export"}
    facts = "\n".join(
        f"| {name.replace('_', ' ')} | {_cell(value)} |"
        for name, value in description.items()
        if name not in skipped
    )
    export = description["export"]
    return CARD.format(
        target=description["target"],
        facts=facts,
        measured=measured,
        folder=export["name"],
        **{name: export[name] for name in ("vocab_size", "parameters", "dtype", "draft_length")},
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
