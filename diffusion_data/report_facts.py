"""A dataset folder -> the numbers and plots of its report.

A dataset of `prepare` tells them itself (run/stats.json, over all samples). Of any other, a bounded number of samples
is read, spread over its shards.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusion_data.dataset_stats import DatasetStats
from diffusion_data.decoded_sample import frames_per_second
from diffusion_data.latent_sample import LatentSample
from diffusion_data.report_plots import Bars, Plot, Spreads, histogram, most_common
from diffusion_data.spread_samples import spread_samples
from diffusion_data.stage_times import WAITS

SAMPLES_READ = 512
"""Of a dataset that doesn't tell its statistics."""

_ASPECTS = {
    "9:21": 9 / 21, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "1:1": 1.0,
    "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "21:9": 21 / 9,
}  # fmt: skip
_TALLER, _WIDER = "taller", "wider"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """numbers: headline -> value, most important first; notes: what one has to know to read them."""

    numbers: dict[str, str]
    plots: list[Plot]
    notes: list[str]


def gather_facts(dataset: Path, shards: Sequence[Path]) -> Facts:
    """What the dataset tells of itself, or what its samples do."""
    try:
        return _told(json.loads((dataset / "run" / "stats.json").read_bytes()))
    except FileNotFoundError:
        notes = []
    # Whatever stands in a file that somebody else made: the samples can still be counted.
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        notes = [f"run/stats.json can't be used ({type(error).__name__})."]
    facts = _counted(shards)
    return replace(facts, notes=[*notes, *facts.notes])


def _told(stats: Mapping[str, Any]) -> Facts:
    """From what `finish_dataset` wrote."""
    rejected = {str(reason): int(count) for reason, count in stats["rejected"].items()}
    rows, written, cut = int(stats["rows"]), int(stats["written"]), int(stats["captions_cut"])
    numbers = {
        "samples": f"{written:,}",
        "rows": f"{rows:,}",
        "rejected": f"{sum(rejected.values()):,} ({sum(rejected.values()) / rows:.1%})",
        "shards": f"{int(stats['shards']):,}",
        "size": format_bytes(int(stats["num_bytes"])),
        "captions cut": f"{cut:,}",
    }
    splits = {str(name): int(count) for name, count in stats["splits"].items() if count}
    if len(splits) > 1:
        numbers |= {f"{name} split": f"{count:,}" for name, count in splits.items()}
    seconds = {str(stage): float(each) for stage, each in stats["stage_seconds"].items() if float(each) >= 0.05}
    plots = [
        *_plots_of_samples(stats),
        Bars(name="rejects", title="Rejected rows", unit="rows", values=most_common(rejected)),
        Bars(
            name="stage_times",
            title="Stage times, summed over ranks",
            unit="seconds",
            values={
                _stage_name(stage): round(each, 1)
                for stage, each in sorted(seconds.items(), key=lambda item: (item[0] in WAITS, -item[1]))
            },
            muted=frozenset(_stage_name(stage) for stage in WAITS),
        ),
    ]
    return Facts(numbers=numbers, plots=[plot for plot in plots if not _is_empty(plot)], notes=[])


def _counted(shards: Sequence[Path]) -> Facts:
    """From a bounded number of samples."""
    stats, notes, captions, unusable = DatasetStats(), list[str](), 0, 0
    for sample in spread_samples(shards, SAMPLES_READ, notes):
        try:
            stats.add(_with_every_field(sample))
        except (ValueError, TypeError, OverflowError, ZeroDivisionError):
            unusable += 1
            continue
        captions += isinstance(sample.metadata.get("caption"), str)
    report = stats.report()
    read = sum(shape[-1] for shape in report["latent_shapes"])
    if unusable:
        notes.append(f"{unusable} samples have metadata that can't be used, and are not counted.")
    notes.append(
        f"This dataset doesn't tell its statistics: they are those of {read} samples, spread over its shards. "
        "Rejected rows and stage times are not known."
    )
    numbers = {
        "samples looked at": f"{read:,}",
        "with a caption": f"{captions:,}",
        "shards": f"{len(shards):,}",
        "size": format_bytes(sum(shard.stat().st_size for shard in shards)),
    }
    plots = [plot for plot in _plots_of_samples(report) if not _is_empty(plot)]
    return Facts(numbers=numbers, plots=plots, notes=notes)


def _with_every_field(sample: LatentSample) -> LatentSample:
    """The sample with the metadata that statistics are made of, as numbers, whoever wrote it."""
    metadata = sample.metadata
    sizes = {name: int(metadata[name]) for name in ("image_height", "image_width", "height", "width")}
    if min(sizes.values()) < 1:
        raise ValueError(f"{sample.key}: a size below 1")
    frames = metadata.get("num_frames")
    return replace(
        sample,
        metadata={
            **sizes,
            "resolution": f"{sizes['width']}x{sizes['height']}",
            "num_frames": None if frames is None else int(frames),
            "framerate": frames_per_second(metadata),
        },
    )


def _plots_of_samples(stats: Mapping[str, Any]) -> list[Plot]:
    resolutions = {str(size): int(count) for size, count in stats["resolutions"].items()}
    return [
        Bars(name="resolutions", title="Resolutions", unit="samples", values=most_common(resolutions)),
        Bars(name="aspect_ratios", title="Aspect ratios, nearest", unit="samples", values=_aspects(resolutions)),
        Bars(name="frames", title="Frames (1 is a picture)", unit="samples", values=_numbers(stats, "num_frames")),
        Bars(name="fps", title="Frames per second of clips", unit="samples", values=_numbers(stats, "framerates")),
        Bars(name="caption_lengths", title="Caption tokens", unit="samples", values=_numbers(stats, "text_tokens")),
        Spreads(
            name="latents",
            title="Latent mean and deviation by channel",
            means=[float(each) for each in stats["latent_mean"]],
            deviations=[float(each) for each in stats["latent_std"]],
        ),
    ]


def _numbers(stats: Mapping[str, Any], name: str) -> dict[str, float]:
    counts = {float(value): int(count) for value, count in stats.get(name, {}).items()}
    if not all(map(math.isfinite, counts)):
        raise ValueError(f"{name}: a value that is no number")
    return histogram(counts)


def _aspects(resolutions: Mapping[str, int]) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for size, count in resolutions.items():
        width, height = map(int, size.split("x"))
        counts[_nearest_aspect(width / height)] += count
    return {name: float(counts[name]) for name in (_TALLER, *_ASPECTS, _WIDER) if counts[name]}


def _nearest_aspect(aspect: float) -> str:
    if not 0.8 * _ASPECTS["9:21"] <= aspect <= 1.25 * _ASPECTS["21:9"]:
        return _TALLER if aspect < 1 else _WIDER
    return min(_ASPECTS, key=lambda name: abs(math.log(_ASPECTS[name] / aspect)))


def _stage_name(stage: str) -> str:
    return f"waiting for {WAITS[stage]}" if stage in WAITS else stage.replace("_", " ")


def _is_empty(plot: Plot) -> bool:
    return not (plot.values if isinstance(plot, Bars) else plot.means)


def format_bytes(number: int) -> str:
    """ "4.0 MB": decimal units, as disks are sold by."""
    amount, units = float(number), ["B", "kB", "MB", "GB", "TB", "PB"]
    while amount >= 999.5 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.3g} {units[0]}" if amount >= 100 or units[0] == "B" else f"{amount:.1f} {units[0]}"
