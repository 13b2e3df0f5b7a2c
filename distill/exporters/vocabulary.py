"""Give a drafter the target's vocabulary size, as serving engines demand it."""

import torch
from transformers import PreTrainedModel


def match_vocabulary(model: PreTrainedModel, size: int) -> int:
    """Pad or trim embeddings and head to `size` rows, in place.

    vLLM refuses a drafter whose `config.vocab_size` is not the target's. Ids past the tokenizer's
    are never in a prompt, but their logits count in every softmax, and a row of zeros has logit 0,
    not -inf: new rows copy the last existing one, which padded checkpoints never use.

    Returns:
        how many rows were added (negative: dropped).
    """
    config = model.config.get_text_config()
    before: int = config.vocab_size
    if before == size:
        return 0
    model.resize_token_embeddings(size, mean_resizing=False)
    if size > before:
        with torch.no_grad():
            for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
                embedding.weight[before:] = embedding.weight[before - 1]
                if getattr(embedding, "bias", None) is not None:
                    embedding.bias[before:] = embedding.bias[before - 1]
    return size - before
