"""The model card of an exported drafter: what it is, and what was measured."""

from collections.abc import Mapping
from typing import Any

CARD = """\
---
library_name: {library}
tags: [speculative-decoding, draft-model, draftsmith]
---

# Drafter for {target}

{what}

## Use

{use}

## How it was made

| | |
| --- | --- |
{facts}

## What was measured

{measured}

Speculative decoding with a lossless rule leaves the target's output as it is, whatever the drafter:
these figures say how much faster it comes, not how good it is.
"""


WHAT_LM = """\
An independent draft model for speculative decoding with the target `{target}`, trained by
[Draftsmith](https://pypi.org/project/draftsmith/). It shares the target's tokenizer and vocabulary
size ({vocab_size:,}), and has {parameters:,} parameters ({dtype})."""

USE_LM = """\
```python
target.generate(**inputs, assistant_model=AutoModelForCausalLM.from_pretrained("{folder}"))
```

```sh
vllm serve {target} --speculative-config \\
  '{{"method": "draft_model", "model": "{folder}", "num_speculative_tokens": {draft_length}}}'
draftsmith evaluate target.path={target} drafters.mine={folder}
```"""

WHAT_TRIMMED = """\
An independent draft model for speculative decoding with the target `{target}`, trained by
[Draftsmith](https://pypi.org/project/draftsmith/). It reads the target's {vocab_size:,} ids and
drafts {num_kept_ids:,} of them: its head has a row for each of these only. Transformers and vLLM
know no such head and refuse the folder; the loader below gives a transformers model.
{parameters:,} parameters ({dtype})."""

USE_TRIMMED = """\
```python
from decode.models import load_lm

target.generate(**inputs, assistant_model=load_lm("{folder}"))
```

```sh
draftsmith evaluate target.path={target} drafters.mine={folder}
```"""

WHAT_HEADS = """\
Decoding heads ({family}) for the target `{target}`, trained by
[Draftsmith](https://pypi.org/project/draftsmith/). They read the target's own last hidden state and
draft nothing without it; {parameters:,} parameters ({dtype}), vocabulary {vocab_size:,}."""

USE_HEADS = """\
```python
from decode import Target
from decode.drafters import load_drafter

drafter = load_drafter("{folder}", target=Target(model), draft={draft_length})
```

```sh
draftsmith evaluate target.path={target} drafters.mine={folder} draft_length={draft_length}
```"""


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
    family = description["family"]
    if family != "lm":
        what, use = WHAT_HEADS, USE_HEADS
    elif "num_kept_ids" in export:
        what, use = WHAT_TRIMMED, USE_TRIMMED
    else:
        what, use = WHAT_LM, USE_LM
    known = {
        "family": family,
        "target": description["target"],
        "folder": export["name"],
        **export,
    }
    return CARD.format(
        library="transformers" if family == "lm" else "draftsmith",
        target=description["target"],
        what=what.format(**known),
        use=use.format(**known),
        facts=facts,
        measured=measured,
    )


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
