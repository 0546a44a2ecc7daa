"""Parts of a sample -> DiffusionSample -> batch: a plain dict of tensors, the keys NeMo's diffusion models read.

Micro batch B, S = seq_length (without one: the longest of the batch), D = patch_spatial**2 * patch_temporal * C,
L = text_embedding_padding_size, E = width of the text encoder:

    video               bfloat16 (B, S, D)   patches, '(T H W) (ph pw pt C)', zero padded
    loss_mask           bfloat16 (B, S)      1 for real patches
    pos_ids             int64    (B, S, 3)   (t, h, w) of each patch
    t5_text_embeddings  bfloat16 (B, L, E)   zero padded
    t5_text_mask        bfloat16 (B, L)      1 for real tokens
    seq_len_q           int32    (B,)        real patches
    seq_len_kv          int32    (B,)        real tokens
    latent_shape        int32    (B, 4)      (C, T, H, W)
    image_size          float32  (B, 4)      [h, w, h, w] in pixels
    fps, num_frames     float32  (B,)        float32, since bfloat16 can't tell 256 from 257 or 29.97 from 30
    __key__             list of B sample keys
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    SavableDataset,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    stateless,
)
from megatron.energon.metadataset.loader_interface import LoadedDataset
from megatron.energon.wrappers import EpochizeDataset, RepeatDataset

from diffusion_data.diffusion_sample import CookedSample, DiffusionSample
from diffusion_data.errors import UserError
from diffusion_data.late_reading import read_late, shuffled
from diffusion_data.latent_sample import LatentSample, largest_magnitude
from diffusion_data.patchify import is_divisible, patchify_into, sequence_length
from diffusion_data.safe_decoder import BadPart, SafeDecoder
from diffusion_data.skip_counts import SkipCounts, SkipReason, StopWhenAllSkipped
from diffusion_data.text_conversion import convert_finite

MAX_MAGNITUDE = 1e3  # NeMo's bound; latents of a sound tokenizer stay far below
PICTURE_FPS = 30.0  # a picture has no frame rate; models were trained with this number in its place
_ASSUMED_TEMPORAL_COMPRESSION = 8  # only for videos whose json doesn't say how many frames they had


@stateless
def cook(sample: dict[str, Any]) -> CookedSample:
    """energon's crude sample -> its decoded parts, whatever they are named."""
    parts = {name: value for name, value in sample.items() if not name.startswith("__")}
    return CookedSample(**basic_sample_keys(sample), parts=parts)


class BasicDiffusionTaskEncoder(DefaultTaskEncoder[CookedSample, DiffusionSample, dict, dict]):
    """Pictures and clips in any mix of shapes.

    max_frames: latent frames kept of a longer clip; everything else is derived from what is left
    text_embedding_padding_size: tokens each text is cut or padded to
    seq_length: patches each sample is padded to; longer ones are skipped
    aesthetic_score: samples whose metadata has a lower aesthetic_score are skipped; those without one stay
    """

    cookers = (Cooker(cook),)
    decoder = SafeDecoder()

    encode_batch = TaskEncoder.encode_batch  # that of DefaultTaskEncoder, which does nothing either, costs a stage

    def __init__(
        self,
        *,
        max_frames: int | None = None,
        text_embedding_padding_size: int = 512,
        seq_length: int | None = None,
        patch_spatial: int = 2,
        patch_temporal: int = 1,
        aesthetic_score: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in [
            ("max_frames", max_frames),
            ("text_embedding_padding_size", text_embedding_padding_size),
            ("seq_length", seq_length),
            ("patch_spatial", patch_spatial),
            ("patch_temporal", patch_temporal),
        ]:
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.max_frames = max_frames
        self.text_embedding_padding_size = text_embedding_padding_size
        self.seq_length = seq_length
        self.patch_spatial = patch_spatial
        self.patch_temporal = patch_temporal
        self.aesthetic_score = aesthetic_score
        self.skips = SkipCounts()

    def sequence_length_of(self, latent_shape: Sequence[int]) -> int | None:
        """Patches that a latent (C, T, H, W) becomes, max_frames considered; None if it would be skipped."""
        channels, frames, height, width = latent_shape
        kept = (channels, min(frames, self.max_frames or frames), height, width)
        if not is_divisible(kept, self.patch_spatial, self.patch_temporal):
            return None
        return sequence_length(kept, self.patch_spatial, self.patch_temporal)

    @stateless
    def encode_sample(self, sample: CookedSample) -> DiffusionSample:
        stored = self._read(sample)
        latent = stored.latent if self.max_frames is None else stored.latent[:, : self.max_frames]
        text = stored.text_embedding[: self.text_embedding_padding_size]
        length = self._checked_length(stored, latent, text)
        text_and_room = torch.empty(self.text_embedding_padding_size, text.shape[1], dtype=torch.bfloat16)
        if not convert_finite(text_and_room, text):
            raise self.skips.skip(stored.key, SkipReason.not_finite, "the text holds NaN or infinity")
        metadata = stored.metadata
        encoded = DiffusionSample.derive_from(
            sample,
            latent=latent,
            text_and_room=text_and_room,
            seq_len_kv=len(text),
            patch_sizes=(self.patch_spatial, self.patch_temporal),
            image_size=(float(metadata["height"]), float(metadata["width"])),
            fps=float(metadata.get("framerate") or PICTURE_FPS),
            num_frames=_pixel_frames(metadata, latent.shape[1], stored.latent.shape[1]),
            seq_len_q=length,
        )
        self.skips.used += 1
        return encoded

    def _read(self, sample: CookedSample) -> LatentSample:
        """The sample, or a counted skip if its parts aren't what they should be."""
        refused = [part.reason for part in sample.parts.values() if isinstance(part, BadPart)]
        if refused:
            raise self.skips.skip(sample.__key__, SkipReason.unreadable, "; ".join(refused))
        try:
            stored = LatentSample.from_parts(sample.__key__, sample.parts)
            for field in ("height", "width", "framerate", "num_frames", "aesthetic_score"):
                value = stored.metadata.get(field)
                if value is not None and not math.isfinite(float(value)):
                    raise ValueError(f"{field} is {value}")
        except (
            ValueError,
            TypeError,
            RuntimeError,
        ) as error:  # torch's refusals to convert are RuntimeErrors
            raise self.skips.skip(sample.__key__, SkipReason.unreadable, str(error)) from error
        return stored

    def _checked_length(self, stored: LatentSample, latent: torch.Tensor, text: np.ndarray) -> int:
        """Patches of the latent; skips what can't be trained on."""
        key, shape = stored.key, tuple(latent.shape)
        score = stored.metadata.get("aesthetic_score")
        if score is not None and float(score) < self.aesthetic_score:
            raise self.skips.skip(key, SkipReason.low_aesthetic_score, f"{score} < {self.aesthetic_score}")
        if latent.numel() == 0 or not is_divisible(shape, self.patch_spatial, self.patch_temporal):
            patch = f"{self.patch_temporal}x{self.patch_spatial}x{self.patch_spatial}"
            raise self.skips.skip(key, SkipReason.not_divisible, f"latent {shape}, patches {patch}")
        length = sequence_length(shape, self.patch_spatial, self.patch_temporal)
        if self.seq_length is not None and length > self.seq_length:
            raise self.skips.skip(key, SkipReason.too_long, f"{length} patches, seq_length={self.seq_length}")
        if len(text) == 0:
            raise self.skips.skip(key, SkipReason.no_text, "its text embedding has no tokens")
        largest = largest_magnitude(latent)
        if not math.isfinite(largest):
            raise self.skips.skip(key, SkipReason.not_finite, "the latent holds NaN or infinity")
        if largest > MAX_MAGNITUDE:
            raise self.skips.skip(key, SkipReason.too_large_values, f"the latent reaches {largest:g}")
        return length

    @stateless
    def batch(self, samples: Sequence[DiffusionSample]) -> dict[str, Any]:
        size, width = len(samples), _require_one_width(samples)
        length = self.seq_length or max(sample.seq_len_q for sample in samples)
        bf16 = torch.bfloat16
        # Every position is written once: what is the sample's, then what is padding.
        video = torch.empty(size, length, width.video, dtype=bf16)
        positions = torch.empty(size, length, 3, dtype=torch.int64)
        if size == 1:
            text = samples[0].text_and_room[None]
        else:
            text = torch.empty(size, self.text_embedding_padding_size, width.text, dtype=bf16)
        for row, sample in enumerate(samples):
            patches, tokens = sample.seq_len_q, sample.seq_len_kv
            patchify_into(video[row, :patches], sample.latent, *sample.patch_sizes)
            positions[row, :patches] = sample.pos_ids
            if size > 1:
                text[row, :tokens] = sample.t5_text_embeddings
            text[row, tokens:] = 0
            if patches < length:
                video[row, patches:] = 0
                positions[row, patches:] = 0
        values = _per_sample_values(samples)
        batch: dict[str, Any] = {
            "video": video,
            "t5_text_embeddings": text,
            "t5_text_mask": _mask(values["seq_len_kv"], text.shape[1]),
            "loss_mask": _mask(values["seq_len_q"], length),
            "pos_ids": positions,
            **values,
        }
        return batch

    def _load_dataset(
        self, dataset: LoadedDataset, worker_rotation_offset: int, worker_config: WorkerConfig
    ) -> SavableDataset[Any]:
        loaded = super()._load_dataset(dataset, worker_rotation_offset, worker_config)
        if type(self.decoder) is SafeDecoder:  # another may want bytes
            read_late(loaded)
        return loaded

    def build_encode_sample(self, dataset: SavableDataset[Any], *, worker_config: WorkerConfig) -> SavableDataset[Any]:
        guarded = StopWhenAllSkipped(dataset, self.skips, worker_config=worker_config)
        return super().build_encode_sample(guarded, worker_config=worker_config)

    def build_train_datasets(
        self,
        *,
        datasets: list[LoadedDataset],
        worker_config: WorkerConfig,
        batch_size: int | None,
        shuffle_buffer_size: int | None,
        virtual_epoch_length: int = 0,
        repeat: bool = True,
        **batching: Any,
    ) -> SavableDataset[Any]:
        """energon's order of stages, but each pass is shuffled by itself (see `EpochShuffle`)."""
        if len(datasets) != 1:
            raise UserError("blends of several datasets can't be opened, only one dataset folder")
        stream = self._load_dataset(datasets[0], 0, worker_config)
        if shuffle_buffer_size is not None and shuffle_buffer_size > 1:
            stream = shuffled(stream, shuffle_buffer_size, worker_config)
        if repeat:
            stream = RepeatDataset(stream, worker_config=worker_config)
        stream = self.build_encode_sample(stream, worker_config=worker_config)
        batching.pop("blend_mode", None)
        stream = self.build_batch(stream, batch_size=batch_size, worker_config=worker_config, **batching)
        if virtual_epoch_length > 0:
            stream = EpochizeDataset(stream, length=virtual_epoch_length, worker_config=worker_config)
        return stream


def _pixel_frames(metadata: Mapping[str, Any], frames: int, stored_frames: int) -> int:
    """Pixel frames of the first `frames` of `stored_frames` latent frames: the first stands for one frame."""
    if frames == 1:
        return 1
    compression: float = _ASSUMED_TEMPORAL_COMPRESSION
    if metadata.get("num_frames"):
        compression = (float(metadata["num_frames"]) - 1) / (stored_frames - 1)
    return 1 + round(compression * (frames - 1))


class _Widths(NamedTuple):
    video: int
    text: int


def _require_one_width(samples: Sequence[DiffusionSample]) -> _Widths:
    """One dataset is made with one tokenizer and one text encoder; a mixture can't be batched."""
    first = _widths(samples[0])
    for sample in samples[1:]:
        widths = _widths(sample)
        for name, width, expected in zip(("video", "t5_text_embeddings"), widths, first, strict=True):
            if width != expected:
                raise UserError(
                    f"{name} of {sample.__key__} is {width} wide, that of {samples[0].__key__} {expected}: the "
                    "dataset mixes the output of different models"
                )
    return first


def _widths(sample: DiffusionSample) -> _Widths:
    patch_spatial, patch_temporal = sample.patch_sizes
    return _Widths(patch_spatial**2 * patch_temporal * sample.latent.shape[0], sample.text_and_room.shape[1])


def _per_sample_values(samples: Sequence[DiffusionSample]) -> dict[str, Any]:
    """What a batch holds once for each sample."""

    def tensor(values: list[Any], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype))  # torch.tensor takes several times as long

    return {
        "seq_len_q": tensor([sample.seq_len_q for sample in samples], np.int32),
        "seq_len_kv": tensor([sample.seq_len_kv for sample in samples], np.int32),
        "image_size": tensor([sample.image_size * 2 for sample in samples], np.float32),
        "fps": tensor([sample.fps for sample in samples], np.float32),
        "num_frames": tensor([sample.num_frames for sample in samples], np.float32),
        "latent_shape": tensor([sample.latent_shape for sample in samples], np.int32),
        "__key__": [sample.__key__ for sample in samples],
    }


def _mask(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """bfloat16 (B, longest): 1 for the first of each row."""
    return (_counting(longest) < lengths.unsqueeze(1)).to(torch.bfloat16)


@lru_cache(maxsize=64)
def _counting(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)
