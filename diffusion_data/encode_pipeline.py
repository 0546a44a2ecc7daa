"""A shard's decoded rows -> LatentSamples, in batches without padding in space or time.

Pictures and clips of equal shape are encoded together, up to a budget of pixels; captions of a shard are
deduplicated, sorted by length and encoded up to a budget of tokens. Batches are formed within a shard and
in row order, so they follow from the rows and the config alone.

Nothing here waits for the device: results are copied to the host while the next batch runs, and whoever
asks an EncodedShard for its samples (the writer's thread) waits for them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.errors import Reason, UserError
from diffusion_data.latent_sample import LatentSample, all_finite, build_metadata, sample_key
from diffusion_data.row_decoder import DecodedRow, RejectedRow
from diffusion_data.shard_plan import Shard
from diffusion_data.stage_times import StageTimes
from diffusion_data.t5_text_encoder import T5TextEncoder

_NO_PIXELS = np.empty((0, 0, 0, 3), np.uint8)
_WAITING_BATCHES = 8  # batches' worth of pixels of all shapes that may wait to be filled up


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """What is encoded at once; part of the fingerprint, since batching changes the low bits of a result.

    pixels_per_batch: height x width x frames x samples; the default is 16 pictures of 512 x 512
    tokens_per_batch: captions x longest caption; a GPU is busy from about 1,000 on
    """

    pixels_per_batch: int = 16 * 512 * 512
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        if self.pixels_per_batch < 1 or self.tokens_per_batch < 1:
            raise UserError("batching: pixels_per_batch and tokens_per_batch are at least 1")


class EncodePipeline:
    """Both encoders on one device."""

    def __init__(self, tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, batching: BatchingConfig) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.batching = batching
        self.device = tokenizer.device

    def run(self, results: Iterable[tuple[Shard, DecodedRow | RejectedRow]]) -> Iterator[EncodedShard]:
        """Encode one shard's rows after the other's; yields a shard once its last row was taken."""
        encoding: _ShardEncoding | None = None
        waited = 0.0
        incoming = iter(results)
        while True:
            started = time.perf_counter()
            entry = next(incoming, None)
            waited += time.perf_counter() - started
            if encoding is not None and (entry is None or entry[0] != encoding.shard):
                yield encoding.finish()
                encoding = None
            if entry is None:
                return
            shard, result = entry
            if encoding is None:
                encoding = _ShardEncoding(self, shard)
            encoding.times.add("wait_for_rows", waited)
            waited = 0.0
            encoding.add(result)

    def encode_frames(self, batch: list[np.ndarray], times: StageTimes) -> torch.Tensor:
        """uint8 (T, H, W, 3) each, all alike -> bfloat16 (B, C, t, h, w) on the host, perhaps not yet there."""
        frames = torch.from_numpy(np.stack(batch))
        with times.busy("tokenizer", self.device):
            return self._to_host(self.tokenizer.encode(self._to_device(frames)))

    def encode_captions(self, captions: list[str], times: StageTimes) -> tuple[dict[str, torch.Tensor], int]:
        """Each caption's float16 (S, D) on the host, perhaps not yet there; and how many were cut."""
        if not captions:
            return {}, 0
        with times.busy("text_tokens"):
            uncut = self.text_encoder.tokenize_uncut(captions)
            tokens = [self.text_encoder.cut(each) for each in uncut]
            num_cut = sum(len(each) > self.text_encoder.max_length for each in uncut)
        embeddings: dict[str, torch.Tensor] = {}
        for batch in batches_by_length([len(each) for each in tokens], self.batching.tokens_per_batch):
            with times.busy("text_encoder", self.device):
                encoded = self.text_encoder.encode_tokens([tokens[index] for index in batch])
                # One copy for the whole batch; the captions' own rows are cut from it on the host.
                flat = self._to_host(torch.cat(encoded))
            lengths = [len(tokens[index]) for index in batch]
            embeddings.update(zip((captions[index] for index in batch), flat.split(lengths), strict=True))
        return embeddings, num_cut

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._cuda else tensor

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"


def batches_by_length(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each at most `budget` tokens when padded to its longest.

    A single one longer than the budget is a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class _Entry:
    """A decoded row on its way: its pixels are let go as soon as they are encoded."""

    row: DecodedRow
    num_frames: int
    height: int
    width: int
    latent: torch.Tensor | None = None


class _ShardEncoding:
    """One shard in the making."""

    def __init__(self, pipeline: EncodePipeline, shard: Shard) -> None:
        self.shard = shard
        self.times = StageTimes()
        self._pipeline = pipeline
        self._results: list[_Entry | RejectedRow] = []
        self._waiting: dict[tuple[int, ...], list[_Entry]] = {}  # by shape, until there is a batch of it
        self._waiting_pixels = 0

    def add(self, result: DecodedRow | RejectedRow) -> None:
        self.times.add("decode", result.seconds)
        if isinstance(result, RejectedRow):
            self._results.append(result)
            return
        frames, height, width, _ = shape = result.pixels.shape
        entry = _Entry(result, frames, height, width)
        self._results.append(entry)
        same_shape = self._waiting.setdefault(shape, [])
        same_shape.append(entry)
        pixels = frames * height * width
        self._waiting_pixels += pixels
        budget = self._pipeline.batching.pixels_per_batch
        if (len(same_shape) + 1) * pixels > budget:
            self._encode(shape)
        elif self._waiting_pixels > _WAITING_BATCHES * budget:
            self._encode(max(self._waiting, key=lambda each: len(self._waiting[each]) * math.prod(each)))

    def _encode(self, shape: tuple[int, ...]) -> None:
        batch = self._waiting.pop(shape)
        latents = self._pipeline.encode_frames([entry.row.pixels for entry in batch], self.times)
        for entry, latent in zip(batch, latents, strict=True):
            entry.latent = latent
            entry.row = replace(entry.row, pixels=_NO_PIXELS)
        self._waiting_pixels -= len(batch) * math.prod(shape[:3])

    def finish(self) -> EncodedShard:
        """Encode what waits and the captions."""
        for shape in list(self._waiting):
            self._encode(shape)
        entries = [each for each in self._results if isinstance(each, _Entry)]
        captions = list(dict.fromkeys(entry.row.caption for entry in entries))
        embeddings, captions_cut = self._pipeline.encode_captions(captions, self.times)
        finished = None
        if self._pipeline.device.type == "cuda":
            finished = torch.cuda.Event()
            finished.record()
        return EncodedShard(self.shard, self._results, embeddings, captions_cut, self.times, finished)


class EncodedShard:
    """A shard that the device is encoding, or has. `samples` waits for it."""

    def __init__(
        self,
        shard: Shard,
        results: list[_Entry | RejectedRow],
        embeddings: dict[str, torch.Tensor],
        captions_cut: int,
        times: StageTimes,
        finished: torch.cuda.Event | None,
    ) -> None:
        self.shard = shard
        self.captions_cut = captions_cut
        self.times = times
        self._results = results
        self._embeddings = embeddings
        self._finished = finished

    def samples(self) -> Iterator[LatentSample | RejectedRow]:
        """Every row of the shard once, in row order: encoded, or rejected with its reason."""
        if self._finished is not None:
            self._finished.synchronize()
        for result in self._results:
            yield result if isinstance(result, RejectedRow) else self._sample(result)

    def _sample(self, entry: _Entry) -> LatentSample | RejectedRow:
        row, latent = entry.row, entry.latent
        assert latent is not None, "every waiting row was encoded when the shard was finished"
        embedding = self._embeddings[row.caption].numpy()
        if not (all_finite(latent) and all_finite(embedding)):
            return RejectedRow(
                row=row.row,
                source_file=row.source_file,
                source_row=row.source_row,
                reason=Reason.non_finite_latent,
                message="the encoders gave NaN or infinity",
                metadata=row.metadata,
            )
        metadata = build_metadata(
            caption=row.caption,
            image_height=row.image_height,
            image_width=row.image_width,
            height=entry.height,
            width=entry.width,
            num_frames=entry.num_frames,
            framerate=row.framerate,
            num_text_tokens=len(embedding),
            source_file=row.source_file,
            source_row=row.source_row,
            extra=row.metadata,
        )
        return LatentSample(key=sample_key(row.row), latent=latent, text_embedding=embedding, metadata=metadata)
