"""Forecast -> the lines that plan=true prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffusion_data.counted import counted
from diffusion_data.forecast import Forecast
from diffusion_data.reject_limit import REJECT_RATE_ROWS
from diffusion_data.shard_plan import Shard
from diffusion_data.stored_size import tar_overhead_bytes

_SHAPES_NAMED = 6
_IDLE_TOLD = 0.1  # of the ranks' time


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What the run would have.

    num_ranks: processes, one a GPU; without GPUs as many as share the processors
    ranks_per_node, processors_per_node: of the node where the plan is made; all are supposed to be alike
    num_workers: decode processes of a rank; 0 decodes in line
    encode_threads: batches that a rank encodes at a time on a CPU, 0 being one in line; None on GPUs
    price_per_hour: of one rank, in whatever currency; None tells no price
    """

    num_ranks: int
    ranks_per_node: int
    processors_per_node: int
    num_workers: int
    encode_threads: int | None
    price_per_hour: float | None

    @property
    def kind(self) -> str:
        """What ranks are counted as."""
        return "GPU" if self.encode_threads is None else "rank"


def forecast_text(
    forecast: Forecast, shards: Sequence[Shard], machines: Machines, max_length: int, max_reject_rate: float
) -> str:
    """Several lines; numbers are of the whole source unless they say otherwise."""
    num_rows = shards[-1].stop
    scale = num_rows / forecast.looked_at
    samples = round(forecast.samples * scale)
    lines = [
        f"plan: {num_rows:,} rows, {forecast.looked_at:,} of them looked at; nothing is written",
        f"  samples   about {samples:,}; shards: {len(shards):,} of {shards[0].num_rows:,} rows",
        *_rejects(forecast, num_rows, max_reject_rate),
    ]
    if forecast.samples:
        lines += [
            *_shapes(forecast),
            *_left_out(forecast, scale),
            _captions(forecast, scale, max_length),
            f"  disk      {_size(expected_bytes(forecast, shards))} of shards, "
            f"{forecast.stored_bytes / forecast.samples / 1000:.0f} kB a sample",
            *_time(forecast, shards, machines),
        ]
    return "\n".join(lines)


def expected_bytes(forecast: Forecast, shards: Sequence[Shard]) -> int:
    """Of all shards together."""
    samples = forecast.stored_bytes * shards[-1].stop / forecast.looked_at
    return round(samples) + len(shards) * tar_overhead_bytes()


def seconds_per_row(forecast: Forecast, machines: Machines) -> dict[str, float]:
    """How long a rank takes for a row, by what holds it up; the largest decides."""
    decode, store, encode, waiting = (
        seconds / forecast.looked_at
        for seconds in (
            forecast.decode_cpu_seconds,
            forecast.store_seconds,
            forecast.frame_seconds + forecast.caption_seconds,
            forecast.decode_seconds,
        )
    )
    processors = machines.processors_per_node / machines.ranks_per_node
    limits = {"fetching and decoding": waiting / max(1, machines.num_workers), "writing": store}
    if machines.encode_threads is None:
        return {"the GPU": encode, "the processors": (decode + store) / processors, **limits}
    return {
        "the processors": (decode + store + encode) / processors,
        "encode_threads": encode / max(1, machines.encode_threads),
        **limits,
    }


def rows_of_busiest_rank(shards: Sequence[Shard], num_ranks: int) -> int:
    """Ranks work on whole shards and take the next as they become free: in turns, where rows take equally long."""
    return max(sum(shard.num_rows for shard in shards[rank::num_ranks]) for rank in range(min(num_ranks, len(shards))))


def _rejects(forecast: Forecast, num_rows: int, max_reject_rate: float) -> Iterator[str]:
    rejected, scale = sum(forecast.rejected.values()), num_rows / forecast.looked_at
    if not rejected:
        # Nothing in n tries leaves, at 95%, a share of 3 / n.
        certainty = "" if scale == 1 else f", so most likely less than {3 / forecast.looked_at:.1%} of all"
        yield f"  rejected  none of {forecast.looked_at:,}{certainty}"
        return
    rate = rejected / forecast.looked_at
    yield f"  rejected  about {round(rejected * scale):,} ({rate:.1%}):"
    for reason, count in forecast.rejected.most_common():
        yield f"            {reason} {round(count * scale):,} ({count:,} seen)"
    if rate > max_reject_rate:
        few = f", which stops runs of {REJECT_RATE_ROWS} rows or more"
        told = few if num_rows < REJECT_RATE_ROWS else " allows: the run would stop"
        yield f"            more than max_reject_rate={max_reject_rate:g}{told}"


def _shapes(forecast: Forecast) -> Iterator[str]:
    shapes = forecast.latent_shapes.most_common()
    yield f"  latents   {counted(len(shapes), 'shape')} (C x T x H x W), commonest first:"
    for shape, count in shapes[:_SHAPES_NAMED]:
        yield f"            {' x '.join(map(str, shape))}: {count / forecast.samples:.1%}"
    if len(shapes) > _SHAPES_NAMED:
        others = sum(count for _, count in shapes[_SHAPES_NAMED:])
        yield f"            {counted(len(shapes) - _SHAPES_NAMED, 'other')}: {others / forecast.samples:.1%}"
    largest = max(shapes, key=lambda each: each[0][1] * each[0][2] * each[0][3])[0]
    yield f"            largest seen: {' x '.join(map(str, largest))}"


def _left_out(forecast: Forecast, scale: float) -> Iterator[str]:
    left_out = forecast.left_out
    seconds = left_out["seconds_kept"] + left_out["seconds_left_out"]
    if left_out["seconds_left_out"]:
        yield f"  videos    {left_out['seconds_left_out'] / seconds:.1%} of their time is in no sample"
    if left_out["clips_dropped"] or left_out["frames_cut"]:
        yield (
            f"            about {counted(round(left_out['clips_dropped'] * scale), 'clip')} too short, "
            f"{counted(round(left_out['frames_cut'] * scale), 'frame')} cut to lengths that are allowed"
        )


def _captions(forecast: Forecast, scale: float, max_length: int) -> str:
    lengths = sorted(forecast.token_lengths)
    cut = sum(length > max_length for length in lengths)
    told = f"about {round(cut * scale):,} ({cut / len(lengths):.1%}) are" if cut else "none is"
    return (
        f"  captions  {lengths[len(lengths) // 2]} tokens in the middle, 95% up to "
        f"{lengths[int(0.95 * (len(lengths) - 1))]}, longest {lengths[-1]}; {told} cut to {max_length}"
    )


def _time(forecast: Forecast, shards: Sequence[Shard], machines: Machines) -> Iterator[str]:
    limits = seconds_per_row(forecast, machines)
    slowest = max(limits, key=limits.__getitem__)
    num_rows, busiest = shards[-1].stop, rows_of_busiest_rank(shards, machines.num_ranks)
    seconds = busiest * limits[slowest]
    ranks = counted(machines.num_ranks, machines.kind)
    yield f"  time      {_duration(seconds)} with {ranks}, {num_rows / seconds:,.1f} rows/s, held up by {slowest}"
    yield (
        f"            {counted(machines.ranks_per_node, machines.kind)} a node of "
        f"{counted(machines.processors_per_node, 'processor')}, "
        f"{counted(machines.num_workers, 'decode process')} each"
    )
    parts = {
        "decoding": forecast.decode_cpu_seconds,
        "tokenizer": forecast.frame_seconds,
        "text encoder": forecast.caption_seconds,
        "writing": forecast.store_seconds,
    }
    told = ", ".join(f"{part} {1000 * each / forecast.looked_at:.2f}" for part, each in parts.items())
    yield f"            ms a row: {told}"
    yield from _idle(shards, machines, busiest)
    if machines.price_per_hour is not None:
        yield f"  money     {_amount(seconds / 3600 * machines.num_ranks * machines.price_per_hour)}"


def _idle(shards: Sequence[Shard], machines: Machines, busiest: int) -> Iterator[str]:
    num_rows, num_ranks = shards[-1].stop, machines.num_ranks
    idle = 1 - num_rows / (busiest * num_ranks)
    if len(shards) < num_ranks:
        enough = f", or a samples_per_shard of at most {num_rows // num_ranks}" if num_rows >= num_ranks else ""
        yield (
            f"            {num_ranks - len(shards):,} of the {counted(num_ranks, machines.kind)} would have no shard: "
            f"take fewer{enough}"
        )
    elif idle > _IDLE_TOLD:
        yield (
            f"            {idle:.0%} of their time they would wait for the last of {len(shards):,} shards: "
            "lower samples_per_shard"
        )


def _amount(money: float) -> str:
    """To the cent, or two digits of what is less."""
    digits = 1 - math.floor(math.log10(money)) if money > 0 else 2
    return f"{money:,.{max(2, digits)}f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} seconds" if seconds >= 1.5 else "about a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 1.5 * 3600 else f"{seconds / 3600:,.1f} hours"


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
