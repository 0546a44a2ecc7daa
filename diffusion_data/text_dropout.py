"""Captions dropped to the empty one, for classifier-free guidance.

Whether a sample loses its caption follows from the seed, the worker and how many samples that had encoded before, so it
is another sample in each epoch and the same one after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from megatron.energon import WorkerConfig

from diffusion_data.dataset_folder import DatasetFolder
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import EMPTY_CAPTION_FILE
from diffusion_data.safe_decoder import decode_part


def uniform(*of: object) -> float:
    """A number in [0, 1), always the same for the same arguments."""
    digest = hashlib.blake2b("/".join(map(str, of)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def uniform_of_call() -> float:
    """A number in [0, 1) for this call of a function of the task encoder; the same if a resume repeats the call."""
    config = WorkerConfig.active_worker_config
    assert config is not None, "outside of a loader"
    # energon numbers the calls of all workers of a rank; this worker's own number stays when workers change ranks.
    call = config.active_worker_sample_index // max(1, config.num_workers)
    return uniform("text dropout", config.worker_seed(), call)


def read_empty_caption(folders: Sequence[DatasetFolder]) -> torch.Tensor:
    """bfloat16 (L, E): the empty caption's embedding, of the first dataset that has one.

    Raises:
        UserError: none has.
    """
    for folder in folders:
        file = folder.path / EMPTY_CAPTION_FILE
        if file.is_file():
            try:
                embedding = np.array(decode_part(file.name, file.read_bytes()), dtype=np.float32)
                if embedding.ndim != 2 or len(embedding) == 0 or not np.isfinite(embedding).all():
                    raise ValueError(f"expected finite numbers (L, E), got {embedding.shape}")
            except (ValueError, TypeError) as error:
                raise UserError(f"{file} can't be used: {error}") from error
            return torch.from_numpy(embedding).to(torch.bfloat16)
    raise UserError(
        f"text_dropout needs the embedding of the empty caption, {EMPTY_CAPTION_FILE}, which "
        f"{', '.join(str(folder.path) for folder in folders)} lacks; copy it from a dataset of the same text encoder"
    )
