"""Samples of a split -> batches of one pass or epoch, which have to be as many on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from megatron.energon import WorkerConfig
from megatron.energon.flavors.webdataset.sharder import Sharder

from diffusion_data.dataset_source import DatasetSource, SplitPart
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError


def longest_of_dataset(source: DatasetSource, encoder: BasicDiffusionTaskEncoder) -> int:
    """Patches of the longest sample.

    Raises:
        UserError: a dataset doesn't tell its latent shapes, or none can be cut into patches.
    """
    shapes = source.latent_shapes()
    if not shapes:
        raise UserError(
            f"{source.name} has no run/stats.json that tells its latent shapes; "
            "set data.seq_length to the patches of its longest sample"
        )
    lengths = [encoder.sequence_length_of(shape) for shape, _ in shapes]
    fitting = [length for length in lengths if length is not None]
    if not fitting:
        raise UserError(f"no latent of {source.name} can be cut into the patches of the task encoder")
    return max(fitting)


def mean_share_of_sequence(source: DatasetSource, encoder: BasicDiffusionTaskEncoder, max_seq_length: int) -> float:
    """Share of a packed sequence that a sample takes on average.

    Raises:
        UserError: a dataset doesn't tell its latent shapes, or all are too long.
    """
    counted = [
        (length, samples)
        for shape, samples in source.latent_shapes() or []
        if (length := encoder.sequence_length_of(shape)) is not None and length <= max_seq_length
    ]
    if not counted:
        raise UserError(
            f"how many packed sequences make an epoch can't be told without a run/stats.json of {source.name} that "
            "has samples of at most max_seq_length patches; set data.virtual_epoch_length"
        )
    patches = sum(length * samples for length, samples in counted)
    return patches / sum(samples for _, samples in counted) / max_seq_length


def batches_of_one_epoch(sequences: float, at_once: int, num_workers: int, accumulation_steps: int) -> int:
    """Batches a rank of about one pass: equally many of each worker, and only full steps of the optimizer.

    sequences: rows of batches in one pass.  at_once: rows of a batch on all ranks together.
    """
    unit = math.lcm(num_workers, accumulation_steps)
    return math.ceil(math.ceil(sequences / at_once) / unit) * unit


def batches_of_longest_rank(parts: Sequence[SplitPart], micro_batch_size: int, num_workers: int, ranks: int) -> int:
    """Batches of one pass over a split, on the rank that has most of them."""
    return max(sum(_batches_of_workers(parts, micro_batch_size, num_workers, rank, ranks)) for rank in range(ranks))


def batches_of_whole_pass(parts: Sequence[SplitPart], micro_batch_size: int, num_workers: int, ranks: int) -> int:
    """Batches a rank of a pass in which each worker gives as many as the one, of any rank, that has most of them."""
    longest = max(max(_batches_of_workers(parts, micro_batch_size, num_workers, rank, ranks)) for rank in range(ranks))
    return longest * max(1, num_workers)


def _batches_of_workers(
    parts: Sequence[SplitPart], micro_batch_size: int, num_workers: int, rank: int, ranks: int
) -> list[int]:
    """Batches of each worker of a rank; energon shares samples out to workers, and each makes batches of its own."""
    config = WorkerConfig(rank=rank, world_size=ranks, num_workers=num_workers)
    samples = [0.0] * max(1, num_workers)
    before = 0
    for part in parts:
        rotation = before % (ranks * len(samples))
        offsets = Sharder.split_samples_to_workers(*part.used, config, rotation_offset=rotation)
        for worker, (start, end) in enumerate(pairwise(offsets)):
            samples[worker] += math.floor((end - start) * part.repetitions)
        before += part.size
    return [math.ceil(number / micro_batch_size) for number in samples]
