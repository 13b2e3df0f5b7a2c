"""The target as a setting: any transformers language model, or the one that ships with it all."""

import enum
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from decode import check_supported, quantize_int8
from distill.errors import UserError

EMBEDDED = Path(__file__).resolve().parent / "embedded_target"
SAMPLED_WEIGHTS = 64


class Dtype(enum.Enum):
    """Number format of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(enum.Enum):
    """How the weights of linear layers are stored."""

    none = "none"
    int8 = "int8"


@dataclass(frozen=True)
class LoadedTarget:
    """A target in memory.

    Attributes:
        model: the language model, in evaluation mode.
        tokenizer: its tokenizer.
        path: what the user called it.
        fingerprint: content hash of configuration and weights: row keys and drafter checkpoints
            name the target by it, wherever it was loaded from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    fingerprint: str

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts are sources that an encoder reads."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def vocab_size(self) -> int:
        """How many ids its outputs are made of; sources may have others."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "decoder_vocab_size", None) or config.vocab_size)

    def fits(self, prompt_length: int, max_new_tokens: int) -> bool:
        """Whether a prompt, or a source, and an output of full length are within the context."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None:
            return True
        if self.is_encoder_decoder:
            longest = max(prompt_length, self.cache_length(prompt_length, max_new_tokens))
            return longest <= int(context)
        return prompt_length + max_new_tokens <= int(context)

    def cache_length(self, prompt_length: int, max_new_tokens: int) -> int:
        """Positions of a cache for the longest prompt; a source takes none of them."""
        if self.is_encoder_decoder:
            prompt_length = 2  # the start token, and a forced one
        return prompt_length + max_new_tokens


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Which model is the target, and how it is loaded.

    Attributes:
        path: a hub id or a local folder; "embedded" is the model that ships with the package.
        revision: of a hub model.
        dtype: auto is what the checkpoint is stored in.
        device: auto takes the first GPU where there is one.
        quantization: int8 quarters the memory of a Llama-like model in float32 on a CPU and decodes
            several times as fast, on one thread; what is decoded exactly then is that model, which
            is near the one in float32. Only evaluate takes it.
        compile: let torch compile the forwards of single sequences, the target's and those of small
            models that draft for it, at its first use some ten seconds each. What cannot be
            compiled here, or gives other numbers then, runs as it would without. Only evaluate
            takes it, with prompts decoded one by one.
        attention: transformers' attn_implementation, sdpa or eager; None lets it choose.
        trust_remote_code: run code that the checkpoint brings along.
    """

    path: str = "embedded"
    revision: str | None = None
    dtype: Dtype = Dtype.float32
    device: str = "auto"
    quantization: Quantization = Quantization.none
    compile: bool = False
    attention: str | None = None
    trust_remote_code: bool = False

    @property
    def location(self) -> str:
        """What `from_pretrained` is given."""
        return str(EMBEDDED) if self.path == "embedded" else self.path

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        self._check_folder()
        try:
            return AutoTokenizer.from_pretrained(
                self.location, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"cannot load the target's tokenizer: {first_line(error)}",
                self.location,
                "give target.path a folder that holds tokenizer files, or a hub id",
            ) from error

    def load(
        self, *, is_only_decoded: bool = False, may_have_encoder: bool = False
    ) -> LoadedTarget:
        """Model and tokenizer.

        The fingerprint is that of the weights as stored: a drafter of theirs is one in int8 too.

        Args:
            is_only_decoded: it may be quantised, and compiled.
            may_have_encoder: an encoder-decoder model will do too.

        Raises:
            UserError: nothing is there, it is no such model, the device is not, or it is to be
                quantised or compiled where it may not or cannot be.
        """
        is_quantized = self.quantization is not Quantization.none
        if self.compile and not is_only_decoded:
            raise UserError(
                "target.compile=true is for evaluate, which decodes prompts one by one",
                hint="leave it out here",
            )
        if self.compile and is_quantized:
            raise UserError(
                f"target.quantization={self.quantization.value} has kernels of its own, which "
                "target.compile=true would not change",
                hint="leave out one of the two",
            )
        if is_quantized and not is_only_decoded:
            raise UserError(
                f"target.quantization={self.quantization.value} is for evaluate: rows and drafters "
                "are made from the target itself",
                hint="leave it out here",
            )
        tokenizer = self.load_tokenizer()
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        config = self.load_config(may_have_encoder=may_have_encoder)
        if config.is_encoder_decoder and self.compile:
            raise UserError(
                f"the forward of {type(config).__name__.removesuffix('Config')}, an "
                "encoder-decoder model, is not compiled",
                self.location,
                "leave out target.compile",
            )
        try:
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_pretrained(
                self.location,
                revision=self.revision,
                dtype=self.dtype.value,
                trust_remote_code=self.trust_remote_code,
                attn_implementation=self.attention,
            )
            model = model.to(device).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._unreadable(error) from error
        try:
            check_supported(model)
        except ValueError as error:
            raise UserError(str(error), self.location) from error
        loaded = LoadedTarget(model, tokenizer, self.path, fingerprint(model))
        if is_quantized:
            try:
                quantize_int8(model)
            except ValueError as error:
                raise UserError(
                    str(error), self.location, "leave out target.quantization"
                ) from error
        return loaded

    def load_config(self, *, may_have_encoder: bool = False) -> Any:
        """The model's configuration alone.

        Raises:
            UserError: there is none, or it is not of a language model, or of one with an encoder
                where that will not do.
        """
        self._check_folder()
        try:
            config = AutoConfig.from_pretrained(
                self.location, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._unreadable(error) from error
        architectures = config.architectures or []
        name = ", ".join(architectures) or type(config).__name__
        if config.is_encoder_decoder and not may_have_encoder:
            raise UserError(
                f"{name} is an encoder-decoder model, for which no drafters but heads are trained",
                self.location,
                "drafter=blockwise, medusa or hydra; or a decoder-only language model as "
                "target.path",
            )
        if architectures and not any(is_language_model(name) for name in architectures):
            raise UserError(
                f"{name} is not a language model that generates",
                self.location,
                "choose one with a language-model head as target.path",
            )
        return config

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(
            f"cannot load the target: {first_line(error)}",
            self.location,
            "check target.path, target.device and target.dtype",
        )

    def _check_folder(self) -> None:
        folder = Path(self.location)
        looks_local = folder.is_absolute() or self.location.startswith((".", "~"))
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise UserError(
                    "the folder holds no config.json, so it is not a complete transformers model",
                    folder,
                    "it may be half-written; give target.path another folder",
                )
        elif looks_local or self.location.count("/") > 1:
            raise UserError("the target's folder does not exist", folder, "check target.path")


def is_language_model(architecture: str) -> bool:
    """Whether transformers' class name is that of a model with a language-model head."""
    return architecture.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")
    )


def fingerprint(model: PreTrainedModel) -> str:
    """Content hash of a model: names, shapes and a sample of every tensor's values.

    It does not depend on where the checkpoint lies or how it is sharded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, len(flat) // SAMPLED_WEIGHTS)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        sample = flat[::step].to(torch.bfloat16)  # whatever dtype it was loaded in
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def first_line(error: Exception) -> str:
    """The first line of a library's message, which is where it says what is wrong."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
