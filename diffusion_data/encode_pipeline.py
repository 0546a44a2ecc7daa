"""A shard's decoded rows -> LatentSamples, in batches without padding in space or time.

Pictures and clips of equal shape are encoded together, up to a budget of pixels; captions of a shard are
deduplicated, sorted by length and encoded up to a budget of tokens. Batches are formed within a shard and
in row order, so they follow from the rows and the config alone.

Results come while the next batches run; whoever asks an EncodedShard for its samples (the writer's thread) waits
for them.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffusion_data.batch_encoder import BatchEncoder, BatchRecord
from diffusion_data.batching import Budgets
from diffusion_data.clips import LeftOut
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_row import DecodedRow, DecodedSample, RejectedRow, sample_metadata
from diffusion_data.errors import Reason
from diffusion_data.latent_sample import LatentSample, all_finite, sample_key
from diffusion_data.shard_plan import Shard
from diffusion_data.stage_times import StageTimes
from diffusion_data.t5_text_encoder import T5TextEncoder

_NO_PIXELS = np.empty((0, 0, 0, 3), np.uint8)
_SHARDS_AHEAD = 2  # of the device; bounds memory
_WAITING_BATCHES = 8  # batches' worth of pixels of all shapes that may wait to be filled up


class EncodePipeline:
    """Both encoders on one device.

    num_threads: batches that a CPU encodes at a time, each in one thread; it changes no bit
    compiled: full batches of frames go through torch.compile
    on_done: as BatchEncoder's
    """

    def __init__(
        self,
        tokenizer: CosmosTokenizer,
        text_encoder: T5TextEncoder,
        budgets: Budgets,
        num_threads: int = 0,
        compiled: bool = False,
        on_done: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        self.budgets = budgets
        self.encoder = BatchEncoder(tokenizer, text_encoder, num_threads, budgets.pixels if compiled else None, on_done)

    def run(self, results: Iterable[tuple[Shard, DecodedRow | RejectedRow]]) -> Iterator[EncodedShard]:
        """Encode one shard's rows after the other's; yields a shard once its last row was taken."""
        waited = StageTimes()  # since the last shard was begun
        encoding: _ShardEncoding | None = None
        unfinished: deque[EncodedShard] = deque()
        incoming = iter(results)
        with self.encoder:
            while True:
                with waited.busy("wait_for_rows"):
                    entry = next(incoming, None)
                if encoding is not None and (entry is None or entry[0] != encoding.shard):
                    encoding.record.times.merge(waited)
                    unfinished.append(encoding.finish())
                    encoding, waited = None, StageTimes()
                    if len(unfinished) > _SHARDS_AHEAD:
                        with waited.busy("wait_for_encoders"):
                            unfinished.popleft().wait()
                    started = time.perf_counter()
                    yield unfinished[-1]
                    waited.add("wait_for_writer", time.perf_counter() - started)
                if entry is None:
                    return
                shard, result = entry
                if encoding is None:
                    encoding = _ShardEncoding(self, shard)
                encoding.add(result)

    def encode_captions(self, num_samples: Mapping[str, int], record: BatchRecord) -> tuple[dict[str, _Pending], int]:
        """Each caption's float16 (S, D) on the host, perhaps not yet there; and how many were cut.

        num_samples: that have the caption
        """
        captions = list(num_samples)
        if not captions:
            return {}, 0
        with record.times.busy("text_tokens"):
            uncut = self.text_encoder.tokenize_uncut(captions)
            tokens = [self.text_encoder.cut(each) for each in uncut]
            num_cut = sum(len(each) > self.text_encoder.max_length for each in uncut)
        embeddings: dict[str, _Pending] = {}
        for batch in batches_by_length([len(each) for each in tokens], self.budgets.tokens):
            samples = sum(num_samples[captions[index]] for index in batch)
            encoded = self.encoder.encode_tokens([tokens[index] for index in batch], record, samples)
            embeddings.update((captions[index], _Pending(encoded, place)) for place, index in enumerate(batch))
        return embeddings, num_cut


@dataclass(frozen=True)
class _Pending:
    """One result of a batch that may still be running."""

    batch: Future[Sequence[torch.Tensor]]
    place: int

    def result(self) -> torch.Tensor:
        return self.batch.result()[self.place]


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
    """A decoded sample on its way: its pixels are let go as soon as they are encoded."""

    sample: DecodedSample
    num_frames: int
    height: int
    width: int
    latent: _Pending | None = None


@dataclass(frozen=True)
class _Row:
    """A decoded row on its way; the samples of it may be in different batches."""

    decoded: DecodedRow
    entries: list[_Entry]


class _ShardEncoding:
    """One shard in the making."""

    def __init__(self, pipeline: EncodePipeline, shard: Shard) -> None:
        self.shard = shard
        self.record = BatchRecord()
        self._pipeline = pipeline
        self._results: list[_Row | RejectedRow] = []
        self._waiting: dict[tuple[int, ...], list[_Entry]] = {}  # by shape, until there is a batch of it
        self._waiting_pixels = 0

    def add(self, result: DecodedRow | RejectedRow) -> None:
        self.record.times.add("decode", result.seconds, result.cpu_seconds)
        if isinstance(result, RejectedRow):
            self._results.append(result)
            return
        row = _Row(replace(result, samples=tuple(map(_without_pixels, result.samples))), [])
        self._results.append(row)
        for sample in result.samples:
            row.entries.append(self._add_sample(sample))

    def _add_sample(self, sample: DecodedSample) -> _Entry:
        frames, height, width, _ = shape = sample.pixels.shape
        entry = _Entry(sample, frames, height, width)
        same_shape = self._waiting.setdefault(shape, [])
        same_shape.append(entry)
        pixels = frames * height * width
        self._waiting_pixels += pixels
        budget = self._pipeline.budgets.pixels
        if (len(same_shape) + 1) * pixels > budget:
            self._encode(shape)
        elif self._waiting_pixels > _WAITING_BATCHES * budget:
            self._encode(max(self._waiting, key=lambda each: len(self._waiting[each]) * math.prod(each)))
        return entry

    def _encode(self, shape: tuple[int, ...]) -> None:
        batch = self._waiting.pop(shape)
        latents = self._pipeline.encoder.encode_frames([entry.sample.pixels for entry in batch], self.record)
        for place, entry in enumerate(batch):
            entry.latent = _Pending(latents, place)
            entry.sample = _without_pixels(entry.sample)
        self._waiting_pixels -= len(batch) * math.prod(shape[:3])

    def finish(self) -> EncodedShard:
        """Encode what waits and the captions."""
        for shape in list(self._waiting):
            self._encode(shape)
        rows = [each for each in self._results if isinstance(each, _Row)]
        captions = Counter(entry.sample.caption for row in rows for entry in row.entries)
        embeddings, captions_cut = self._pipeline.encode_captions(captions, self.record)
        finished = self._pipeline.encoder.finished()
        return EncodedShard(self.shard, self._results, embeddings, captions_cut, self.record, finished)


@dataclass(frozen=True)
class EncodedRow:
    """All samples of a row, in the order of their keys; left_out: as DecodedRow's."""

    samples: list[LatentSample]
    left_out: LeftOut


def _without_pixels(sample: DecodedSample) -> DecodedSample:
    return replace(sample, pixels=_NO_PIXELS)


class EncodedShard:
    """A shard that is being encoded, or has been. `rows` waits for it."""

    def __init__(
        self,
        shard: Shard,
        results: list[_Row | RejectedRow],
        embeddings: dict[str, _Pending],
        captions_cut: int,
        record: BatchRecord,
        finished: torch.cuda.Event | None,
    ) -> None:
        self.shard = shard
        self.captions_cut = captions_cut
        self.record = record
        self._results = results
        self._embeddings = embeddings
        self._finished = finished

    def wait(self) -> None:
        """Return when everything is on the host."""
        for result in self._results:
            for entry in result.entries if isinstance(result, _Row) else ():
                if entry.latent is not None:
                    entry.latent.result()
        for embedding in self._embeddings.values():
            embedding.result()
        if self._finished is not None:
            self._finished.synchronize()

    def rows(self) -> Iterator[EncodedRow | RejectedRow]:
        """Every row of the shard once, in row order: all its samples, or rejected with its reason."""
        self.wait()
        for result in self._results:
            yield result if isinstance(result, RejectedRow) else self._encoded(result)

    def _encoded(self, row: _Row) -> EncodedRow | RejectedRow:
        decoded = row.decoded
        samples = [self._sample(decoded, number, entry) for number, entry in enumerate(row.entries)]
        if all(all_finite(sample.latent) and all_finite(sample.text_embedding) for sample in samples):
            return EncodedRow(samples, decoded.left_out)
        return RejectedRow(
            row=decoded.row,
            source_file=decoded.source_file,
            source_row=decoded.source_row,
            reason=Reason.non_finite_latent,
            message="the encoders gave NaN or infinity",
            metadata=row.entries[0].sample.metadata,
        )

    def _sample(self, row: DecodedRow, number: int, entry: _Entry) -> LatentSample:
        assert entry.latent is not None, "every waiting sample was encoded when the shard was finished"
        sample = entry.sample
        embedding = self._embeddings[sample.caption].result().numpy()
        metadata = sample_metadata(row, sample, (entry.num_frames, entry.height, entry.width), len(embedding))
        return LatentSample(
            key=sample_key(row.row, number, len(row.samples)),
            latent=entry.latent.result(),
            text_embedding=embedding,
            metadata=metadata,
        )
