"""Parts of a sample -> DiffusionSample -> batch: a plain dict of tensors, the keys NeMo's diffusion models read.

Micro batch B, S = seq_length (without one, or bucketed: the longest of the batch), D = patch_spatial**2 *
patch_temporal * C, L = text_embedding_padding_size (or the longest of the batch), E = width of the text encoder:

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
    __subflavors__      list of B dicts; only where the dataset or blend gives its samples some

Packed (max_seq_length), B counts sequences, each of which holds several samples, one after another, and then padding;
S = max_seq_length, L = the longest row of texts of the batch, which lie in the same way, in rows of their own. There
are N samples in all rows together, in the order of the rows. video, loss_mask, pos_ids, t5_text_embeddings and
t5_text_mask are as above; of seq_len_q to __subflavors__ there are N instead of B; and there are

    cu_seqlens_q, cu_seqlens_kv                int32 (N+1,)  0 and the cumulative sums of seq_len_q and seq_len_kv
    cu_seqlens_q_padded, cu_seqlens_kv_padded  int32 (N+1,)  where each sample begins in the B * S or B * L positions of
                                                             all rows, flattened; at last B * S, B * L

The first two are what attention kernels for packed sequences take (flash-attn's varlen functions, for sequences from
which the padding was taken out); with the last two, Transformer Engine takes them with padding between sequences.

With length_multiple > 1 (2 x tensor- x context-parallel size), S and L are rounded up to multiples of it, and in packed
rows each sample begins at one, as ring attention needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.energon import Cooker, basic_sample_keys, stateless

from diffusion_data.diffusion_sample import CookedSample, DiffusionSample
from diffusion_data.diffusion_stages import DiffusionStages
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LatentSample, largest_magnitude
from diffusion_data.latent_scaling import PER_CHANNEL, LatentScaling
from diffusion_data.patchify import is_divisible, sequence_length
from diffusion_data.safe_decoder import BadPart, SafeDecoder
from diffusion_data.sample_filters import parse_filters
from diffusion_data.skip_counts import SkipCounts, SkipReason
from diffusion_data.text_conversion import convert_finite

MAX_MAGNITUDE = 1e3  # NeMo's bound; latents of a sound tokenizer stay far below
TEXT_PADDINGS = ("fixed", "longest")
PICTURE_FPS = 30.0  # a picture has no frame rate; models were trained with this number in its place
_ASSUMED_TEMPORAL_COMPRESSION = 8  # only for videos whose json doesn't say how many frames they had


@stateless
def cook(sample: dict[str, Any]) -> CookedSample:
    """energon's crude sample -> its decoded parts, whatever they are named."""
    parts = {name: value for name, value in sample.items() if not name.startswith("__")}
    return CookedSample(**basic_sample_keys(sample), parts=parts)


class BasicDiffusionTaskEncoder(DiffusionStages):
    """Pictures and clips in any mix of shapes.

    max_frames: latent frames kept of a longer clip; everything else is derived from what is left
    text_embedding_padding_size: tokens each text is cut to, and padded to
    text_padding: fixed, or longest: texts are padded to the longest of their batch only
    seq_length: patches each sample is padded to; longer ones are skipped. In packed and bucketed batches, where
        nothing is padded to it, only the latter
    max_seq_length: patches a packed sequence holds; not used without energon's packing_buffer_size
    bucket_by_shape: batches of equal latent shape, without padding
    length_multiple: what the length of a sequence has to divide by, see `parallel_ranks`
    aesthetic_score: samples whose metadata has a lower aesthetic_score are skipped; those without one stay
    filters: bounds on fields of the metadata, see `sample_filters`
    max_magnitude: samples whose latent has a larger absolute value are skipped
    text_dropout: share of the training samples whose caption becomes the empty one, see `text_dropout`
    latent_scaling: what becomes of raw latents, see `latent_scaling`
    """

    cookers = (Cooker(cook),)
    decoder = SafeDecoder()

    def __init__(
        self,
        *,
        max_frames: int | None = None,
        text_embedding_padding_size: int = 512,
        text_padding: str = "fixed",
        seq_length: int | None = None,
        max_seq_length: int | None = None,
        bucket_by_shape: bool = False,
        length_multiple: int = 1,
        patch_spatial: int = 2,
        patch_temporal: int = 1,
        aesthetic_score: float = 0.0,
        filters: Mapping[str, Mapping[str, Any]] | None = None,
        max_magnitude: float = MAX_MAGNITUDE,
        text_dropout: float = 0.0,
        latent_scaling: str | float | None = None,
    ) -> None:
        super().__init__()
        for name, value in [
            ("max_frames", max_frames),
            ("text_embedding_padding_size", text_embedding_padding_size),
            ("seq_length", seq_length),
            ("max_seq_length", max_seq_length),
            ("length_multiple", length_multiple),
            ("patch_spatial", patch_spatial),
            ("patch_temporal", patch_temporal),
        ]:
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if text_padding not in TEXT_PADDINGS:
            raise UserError(f"text_padding must be one of {', '.join(TEXT_PADDINGS)}, got {text_padding!r}")
        if not 0 <= text_dropout <= 1:
            raise UserError(f"text_dropout must be a share, 0 to 1, got {text_dropout}")
        if not max_magnitude > 0:
            raise UserError(f"max_magnitude must be above 0, got {max_magnitude}")
        self.max_frames = max_frames
        self.text_embedding_padding_size = text_embedding_padding_size
        self.text_padding = text_padding
        self.seq_length = seq_length
        self.max_seq_length = max_seq_length
        self.bucket_by_shape = bucket_by_shape
        self.length_multiple = length_multiple
        self.patch_spatial = patch_spatial
        self.patch_temporal = patch_temporal
        self.aesthetic_score = aesthetic_score
        self.bounds = parse_filters(filters or {})
        self.max_magnitude = max_magnitude
        self.text_dropout = text_dropout
        self.latent_scaling = latent_scaling
        self.scaling = None if latent_scaling in (None, PER_CHANNEL) else LatentScaling.by(latent_scaling)  # type: ignore[arg-type]
        self._numbers = {"height", "width", "framerate", "num_frames", "aesthetic_score"}
        self._numbers |= {bound.field for bound in self.bounds}
        self.skips = SkipCounts(reason for bound in self.bounds for reason in bound.reasons)

    def settings(self) -> dict[str, Any]:
        """What decides which samples come in which order, beside the dataset and its loader."""
        return {
            "patches": [self.patch_spatial, self.patch_temporal],
            "max_frames": self.max_frames,
            "seq_length": self.seq_length,
            "max_seq_length": self.max_seq_length,
            "bucket_by_shape": self.bucket_by_shape,
            "length_multiple": self.length_multiple,
            "aesthetic_score": self.aesthetic_score,
            "filters": [str(bound) for bound in self.bounds],
            "max_magnitude": self.max_magnitude,
            "text_dropout": self.text_dropout,
        }

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
        text_and_room = torch.empty(self._text_room(len(text)), text.shape[1], dtype=torch.bfloat16)
        if not convert_finite(text_and_room, text):
            raise self.skips.skip(stored.key, SkipReason.not_finite, "the text holds NaN or infinity")
        if self.scaling is not None:
            latent = self.scaling.apply(latent)
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
            raise self.skips.skip(_place(sample), SkipReason.unreadable, "; ".join(refused))
        try:
            stored = LatentSample.from_parts(sample.__key__, sample.parts)
            for field in self._numbers:
                value = stored.metadata.get(field)
                if value is not None and not math.isfinite(float(value)):
                    raise ValueError(f"{field} is {value}")
        except (
            ValueError,
            TypeError,
            RuntimeError,
        ) as error:  # torch's refusals to convert are RuntimeErrors
            raise self.skips.skip(_place(sample), SkipReason.unreadable, str(error)) from error
        return stored

    def _checked_length(self, stored: LatentSample, latent: torch.Tensor, text: np.ndarray) -> int:
        """Patches of the latent; skips what can't be trained on."""
        key, shape = stored.key, tuple(latent.shape)
        for bound in self.bounds:
            skipped = bound.reason_to_skip(stored.metadata)
            if skipped is not None:
                raise self.skips.skip(key, *skipped)
        score = stored.metadata.get("aesthetic_score")
        if score is not None and float(score) < self.aesthetic_score:
            raise self.skips.skip(key, SkipReason.low_aesthetic_score, f"{score} < {self.aesthetic_score}")
        if latent.numel() == 0 or not is_divisible(shape, self.patch_spatial, self.patch_temporal):
            patch = f"{self.patch_temporal}x{self.patch_spatial}x{self.patch_spatial}"
            raise self.skips.skip(key, SkipReason.not_divisible, f"latent {shape}, patches {patch}")
        length = sequence_length(shape, self.patch_spatial, self.patch_temporal)
        for name, limit in (("seq_length", self.seq_length), ("max_seq_length", self.max_seq_length)):
            if limit is not None and length > limit:
                raise self.skips.skip(key, SkipReason.too_long, f"{length} patches, {name}={limit}")
        if len(text) == 0:
            raise self.skips.skip(key, SkipReason.no_text, "its text embedding has no tokens")
        largest = largest_magnitude(latent)
        if not math.isfinite(largest):
            raise self.skips.skip(key, SkipReason.not_finite, "the latent holds NaN or infinity")
        if largest > self.max_magnitude:
            raise self.skips.skip(key, SkipReason.too_large_values, f"the latent reaches {largest:g}")
        return length


def _place(sample: CookedSample) -> str:
    """The sample's shard and key, for those who have to find it."""
    shards = {source.shard_name for source in sample.__sources__ or ()}
    return " of ".join([sample.__key__, *sorted(filter(None, shards))])


def _pixel_frames(metadata: Mapping[str, Any], frames: int, stored_frames: int) -> int:
    """Pixel frames of the first `frames` of `stored_frames` latent frames: the first stands for one frame."""
    if frames == 1:
        return 1
    compression: float = _ASSUMED_TEMPORAL_COMPRESSION
    if metadata.get("num_frames"):
        compression = (float(metadata["num_frames"]) - 1) / (stored_frames - 1)
    return 1 + round(compression * (frames - 1))
