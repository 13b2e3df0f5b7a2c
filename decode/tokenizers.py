"""Do drafter and target speak of the same tokens?"""

import hashlib

from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = ("bos_token", "eos_token")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Content hash of what ids mean: the vocabulary with its ids, and BOS and EOS."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        digest.update(f"{index}\0{token}\n".encode(errors="surrogatepass"))
    for name in SPECIAL_TOKENS:
        digest.update(f"{name}={getattr(tokenizer, name)}\n".encode())
    return digest.hexdigest()


def check_tokenizers(target: PreTrainedTokenizerBase, drafter: PreTrainedTokenizerBase) -> None:
    """Raise ValueError, naming the difference, where the two give tokens different ids."""
    target_vocab, drafter_vocab = target.get_vocab(), drafter.get_vocab()
    if target_vocab != drafter_vocab:
        differing = sorted(
            token
            for token in target_vocab.keys() | drafter_vocab.keys()
            if target_vocab.get(token) != drafter_vocab.get(token)
        )
        token = differing[0]
        raise ValueError(
            "the drafter's tokenizer is not the target's: "
            f"{len(differing):,} tokens differ, for example {token!r} is "
            f"{target_vocab.get(token, 'absent')} in the target's and "
            f"{drafter_vocab.get(token, 'absent')} in the drafter's; "
            "train a drafter with this target's tokenizer"
        )
    for name in SPECIAL_TOKENS:
        ours, theirs = getattr(target, name), getattr(drafter, name)
        if ours != theirs:
            raise ValueError(
                f"the drafter's {name} is {theirs!r}, the target's {ours!r}; "
                "use the target's tokenizer files for the drafter"
            )
