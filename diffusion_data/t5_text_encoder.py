"""Captions -> token ids -> text embeddings: float16 (S, D), of the S real tokens, no padding.

A caption's S counts its end token (`</s>`), so the empty caption has S = 1. Captions above `max_length`
tokens are cut and keep their end token. The network computes in bfloat16 on CUDA (float16 overflows in
T5) and float32 on CPU; what leaves here is float16.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_data.errors import UserError
from diffusion_data.t5_files import CONFIG, TOKENIZERS, files_of_t5, find_t5, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel


class T5TextEncoder:
    """Made by `from_pretrained`. Callers batch: `encode_tokens` runs what it is given in one forward."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: T5EncoderModel,
        *,
        name: str,
        max_length: int,
        weight_files: list[Path],
    ) -> None:
        if max_length < 1:
            raise UserError(f"text_encoder.max_length is {max_length}: it must be at least 1")
        self._tokenizer = tokenizer
        self._model = model
        self._name = name
        self.max_length = max_length
        self.weight_files = weight_files
        """Every file that the embeddings depend on, tokenizer and config included: for the fingerprint."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        cache_dir: str | Path | None = None,
        max_length: int = 512,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> T5TextEncoder:
        """Loads a bundled model ("tiny-t5"), a folder, or a Hugging Face repository.

        dtype: None is bfloat16 on CUDA and float32 elsewhere.
        """
        device = torch.device(device)
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if dtype == torch.float16:
            raise UserError("T5 overflows in float16: use bfloat16 or float32 for the text encoder")
        name = str(name_or_path)
        folder = find_t5(name, cache_dir)
        weight_files = files_of_t5(name, folder)
        tokenizer, model = _load(name, folder, dtype)
        return cls(
            tokenizer,
            torch.nn.Module.to(model, device).eval(),
            name=name,
            max_length=max_length,
            weight_files=weight_files,
        )

    @property
    def embedding_dim(self) -> int:
        return self._model.config.d_model

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation; what leaves here is float16 in any case."""
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        return self._model.device

    def tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption with its end token, at most max_length of them, unpadded."""
        return [self.cut(token_ids) for token_ids in self.tokenize_uncut(captions)]

    def tokenize_uncut(self, captions: Sequence[str]) -> list[list[int]]:
        """As tokenize, of any length: `len(ids) > max_length` tells which captions `cut` will shorten."""
        if not captions:
            return []
        # verbose: the tokenizer would warn of long captions here, which are cut or counted by the caller.
        encoded = self._tokenizer(list(captions), truncation=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]

    def cut(self, token_ids: list[int]) -> list[int]:
        """The first max_length tokens; the last of them becomes the end token, as in an uncut caption."""
        if len(token_ids) <= self.max_length:
            return token_ids
        return token_ids[: self.max_length - 1] + token_ids[-1:]

    @torch.inference_mode()
    def encode_tokens(self, token_ids: Sequence[list[int]]) -> list[torch.Tensor]:
        """One forward, padded to the longest: float16 (S_i, D) each on the model's device, in order.

        Nothing here waits for the device, so whether float16 holds every value is the reader's to check.
        """
        if not token_ids:
            return []
        lengths = [len(ids) for ids in token_ids]
        if min(lengths) < 1 or max(lengths) > self.max_length:
            raise ValueError(
                f"expected 1 to {self.max_length} tokens a caption, "
                f"got {min(lengths)} to {max(lengths)}: ids come from tokenize()"
            )
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        padded = torch.full(mask.shape, self._model.config.pad_token_id or 0)
        padded[mask] = torch.tensor(list(chain.from_iterable(token_ids)))
        # The mask is passed even where nothing is padded: without one, padding would be read as text.
        hidden = self._model(
            input_ids=self._to_device(padded), attention_mask=self._to_device(mask.long())
        ).last_hidden_state
        return [row[:length] for row, length in zip(hidden.to(torch.float16), lengths, strict=True)]

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """tokenize and encode_tokens in one batch: float16 (S, D) each, in order.

        Raises:
            UserError: a value that float16 can't hold.
        """
        embeddings = self.encode_tokens(self.tokenize(captions))
        if not all(torch.isfinite(embedding).all() for embedding in embeddings):
            raise UserError(
                f"text encoder {self._name!r} gave values that are not finite in float16: its weights are damaged "
                "or it is no T5 encoder that this dataset format can hold"
            )
        return [embedding.cpu().numpy().copy() for embedding in embeddings]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _load(name: str, folder: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, T5EncoderModel]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, T5EncoderModel

    kind = read_json(folder / CONFIG).get("model_type")
    if kind != "t5":
        raise UserError(f"text encoder {name!r}: {folder / CONFIG} is of model_type {kind!r}, not 't5'")
    if not (folder / TOKENIZERS[0]).is_file() and find_spec("sentencepiece") is None:
        raise UserError(
            f"text encoder {name!r}: {folder} has only {TOKENIZERS[1]}, which is read with sentencepiece: "
            "pip install sentencepiece"
        )
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            # By folder, not by name: for a name, transformers may convert weights in the background.
            # Tensors of a wrong shape are reported below, in fewer words than transformers has for them.
            loaded: Any = T5EncoderModel.from_pretrained(
                folder,
                local_files_only=True,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"text encoder {name!r}: the weights file in {folder} is damaged, "
            "or holds more than tensors and would run code"
        ) from error
    except (ImportError, LookupError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"can't load the text encoder {name!r} from {folder}: {_one_line(error)}") from error
    model, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if absent:
        raise UserError(
            f"text encoder {name!r}: the weights in {folder} don't fit its {CONFIG}: "
            f"{len(absent)} tensors are missing or of another shape, {absent[0]} among them"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"text encoder {name!r}: the tokenizer in {folder} has {len(tokenizer)} tokens, "
            f"the network {model.config.vocab_size}: they don't belong together"
        )
    return tokenizer, model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """It draws bars while it loads, on every rank, and tables when it fails, before an error says the same."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200].rstrip('.')}"
