"""plan=true: a look at rows spread over the source -> what the whole run will take and give. Nothing is written.

    rows at even distances ─ decode ─▶ sizes, captions, rejects ───────▶ Forecast
                                └─ a batch of each shape ─ encode ─▶ seconds ──┘

Bytes follow from the sizes that samples will have, times from batches like the run's.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from diffusion_data.batching import Budgets
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.decoded_row import DecodedRow, RejectedRow
from diffusion_data.encode_cost import EncodeCost
from diffusion_data.sources import ParquetSource, Row
from diffusion_data.spread import coarse_to_fine
from diffusion_data.stored_size import latent_shape, stored_bytes
from diffusion_data.t5_text_encoder import T5TextEncoder

_ROWS = 384
_ROWS_A_PLACE = 8  # read in one go: opening a file costs more than a few rows
_SECONDS = 20.0  # for decoding; where it isn't enough, fewer places are looked at


@dataclass(kw_only=True)
class Forecast:
    """Sums over the rows that were looked at.

    left_out: the fields of LeftOut
    token_lengths: of each caption, uncut
    stored_bytes: in shards, without what each shard adds
    decode_seconds: that workers were at it, also where they waited for a network
    decode_cpu_seconds, store_seconds: of one processor
    frame_seconds, caption_seconds: of a GPU, or of one processor
    """

    looked_at: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    latent_shapes: Counter[tuple[int, int, int, int]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    token_lengths: list[int] = field(default_factory=list)
    stored_bytes: int = 0
    decode_seconds: float = 0.0
    decode_cpu_seconds: float = 0.0
    store_seconds: float = 0.0
    frame_seconds: float = 0.0
    caption_seconds: float = 0.0

    @property
    def samples(self) -> int:
        """That the decoded rows became."""
        return len(self.token_lengths)


def make_forecast(
    source: ParquetSource,
    workers: DecodeWorkers,
    tokenizer: CosmosTokenizer,
    text_encoder: T5TextEncoder,
    budgets: Budgets,
) -> Forecast:
    """Decode rows from all over the source as the run does, and encode a few batches of them."""
    forecast = Forecast()
    cost = EncodeCost(tokenizer, text_encoder, budgets)
    for _, result in workers.map((None, row) for row in _spread_rows(source)):
        forecast.looked_at += 1
        forecast.decode_seconds += result.seconds
        forecast.decode_cpu_seconds += result.cpu_seconds
        if isinstance(result, RejectedRow):
            forecast.rejected[result.reason.value] += 1
        else:
            _add(forecast, cost, result, tokenizer, text_encoder)
    if forecast.samples:
        forecast.frame_seconds, forecast.caption_seconds = cost.frame_seconds(), cost.caption_seconds()
    return forecast


def _add(
    forecast: Forecast, cost: EncodeCost, row: DecodedRow, tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder
) -> None:
    forecast.left_out.update(asdict(row.left_out))
    for number, sample in enumerate(row.samples):
        (uncut,) = text_encoder.tokenize_uncut([sample.caption])
        token_ids = text_encoder.cut(uncut)
        shape = latent_shape(sample, tokenizer)
        cost.add(sample.pixels, token_ids)
        started = time.thread_time()
        forecast.stored_bytes += stored_bytes(row, number, shape, len(token_ids), text_encoder.embedding_dim)
        forecast.store_seconds += time.thread_time() - started
        forecast.latent_shapes[shape] += 1
        forecast.token_lengths.append(len(uncut))


def _spread_rows(source: ParquetSource) -> Iterator[Row]:
    """All rows of a small source; else some at each of many places, which stay spread when the time is over early."""
    places = _places(source)
    deadline = time.monotonic() + _SECONDS
    for number, place in enumerate(coarse_to_fine(len(places))):
        if number and time.monotonic() > deadline:
            return
        yield from source.read_rows(*places[place])


def _places(source: ParquetSource) -> list[tuple[int, int]]:
    """(start, stop) of ranges of rows that don't overlap.

    A row is reached by decoding its row group from the beginning, so a place goes there if no other has.
    """
    number = max(1, _ROWS // _ROWS_A_PLACE)
    if source.num_rows <= _ROWS:
        number = -(-source.num_rows // _ROWS_A_PLACE)
    places: list[tuple[int, int]] = []
    for place in range(number):
        start, end = place * source.num_rows // number, (place + 1) * source.num_rows // number
        beginning = source.row_group_start(start)
        taken = places[-1][1] if places else 0
        if source.num_rows > _ROWS and beginning >= taken:
            start = beginning
        places.append((start, min(start + _ROWS_A_PLACE, end)))
    return places
