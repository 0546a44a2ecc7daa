"""Which fake samples come in which batch of which rank, the same on every rank, and the loader of a rank's batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, count, islice, tee
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.energon_loaders import without_samples
from diffusion_data.errors import UserError
from diffusion_data.fake_latents import FakeLatents, Place
from diffusion_data.packed_layout import rounded_up
from diffusion_data.parallel_ranks import DataParallel
from diffusion_data.sequence_packing import pack_sequences

Row = list[int]  # samples that share a row of a batch
BatchPlan = list[Row]


class BatchPlanner:
    """Sample numbers in some order -> batches, packed or bucketed as the task encoder is set up."""

    def __init__(
        self,
        dataset: FakeLatents,
        task_encoder: BasicDiffusionTaskEncoder,
        micro_batch_size: int,
        packing_buffer_size: int | None,
    ) -> None:
        self._dataset = dataset
        self._encoder = task_encoder
        self._micro_batch_size = micro_batch_size
        self._packing_buffer_size = packing_buffer_size

    def batches(self, order: Sequence[int]) -> list[BatchPlan]:
        if self._encoder.bucket_by_shape:
            by_shape: dict[tuple[int, ...], list[Row]] = defaultdict(list)
            for index in order:
                by_shape[self._dataset.latent_shape(index)].append([index])
            return [batch for rows in by_shape.values() for batch in self._in_batches(rows)]
        return self._in_batches(self._rows(order))

    def _rows(self, order: Sequence[int]) -> list[Row]:
        if self._packing_buffer_size is None:
            return [[index] for index in order]
        assert self._encoder.max_seq_length is not None
        multiple = self._encoder.length_multiple
        rows = []
        for start in range(0, len(order), self._packing_buffer_size):
            buffer = order[start : start + self._packing_buffer_size]
            lengths = [self._encoder.sequence_length_of(self._dataset.latent_shape(index)) or 0 for index in buffer]
            packs = pack_sequences(
                [rounded_up(length, multiple) for length in lengths],
                rounded_up(self._encoder.max_seq_length, multiple),
            )
            rows += [[buffer[position] for position in sorted(pack)] for pack in packs]
        return rows

    def _in_batches(self, rows: list[Row]) -> list[BatchPlan]:
        size = self._micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]


class PlannedBatch(NamedTuple):
    rows: BatchPlan
    pass_number: int
    has_samples: bool
    """False for one that only fills a rank's pass up."""


class FakeLoader:
    """Batches of one data-parallel rank; every rank has equally many.

    Training: pass after pass over the samples, each in an order of its own; where samples are packed or bucketed, it is
    the batches whose order is new. An epoch that was left, or that a checkpoint interrupted, goes on where it was.
    Validation: one pass, in order, from the start each time.

    batches_a_step: of all ranks; what doesn't fill such a step is left out of a pass. None leaves nothing out: ranks
        with fewer batches than others end a pass with batches without samples
    epoch_length: batches; None for one pass
    """

    def __init__(
        self,
        dataset: FakeLatents,
        planner: BatchPlanner,
        parallel: DataParallel,
        *,
        training: bool,
        batches_a_step: int | None,
        epoch_length: int | None,
        seed: int,
        keeps_samples_together: bool,
        **loading: Any,
    ) -> None:
        self._dataset = dataset
        self._planner = planner
        self._parallel = parallel
        self._training = training
        self._batches_a_step = batches_a_step
        self._seed = seed
        self._loading = loading
        self.batches_done = 0
        """Batches given, in all epochs of training."""
        self._fixed = planner.batches(range(len(dataset))) if keeps_samples_together else None
        self._pass_length = -(-len(self._all_batches(0)) // parallel.size)
        self._length = epoch_length or self._pass_length
        if self._pass_length == 0:
            raise UserError(
                f"{len(dataset)} fake samples don't fill one step on {parallel.size} ranks; raise num_train_samples"
            )

    def _all_batches(self, pass_number: int) -> list[BatchPlan]:
        """Of all ranks, in a pass."""
        if not self._training:
            return self._fixed or self._planner.batches(range(len(self._dataset)))
        rng = np.random.default_rng([self._seed, pass_number])
        if self._fixed is not None:
            batches = [self._fixed[number] for number in rng.permutation(len(self._fixed))]
        else:
            batches = self._planner.batches(rng.permutation(len(self._dataset)).tolist())
        if self._batches_a_step is None:
            return batches
        full = max((len(batch) for batch in batches), default=0)
        batches = [batch for batch in batches if len(batch) == full]
        return batches[: len(batches) // self._batches_a_step * self._batches_a_step]

    def _pass(self, pass_number: int) -> list[PlannedBatch]:
        """Of this rank."""
        batches = self._all_batches(pass_number)
        own = [PlannedBatch(rows, pass_number, True) for rows in batches[self._parallel.rank :: self._parallel.size]]
        filler = PlannedBatch(own[0].rows if own else batches[0], pass_number, False)
        return own + [filler] * (self._pass_length - len(own))

    def _rest_of_epoch(self) -> Iterator[PlannedBatch]:
        first_pass, done = divmod(self.batches_done, self._pass_length)
        left = self._length - self.batches_done % self._length
        return islice(chain.from_iterable(map(self._pass, count(first_pass))), done, done + left)

    def _places(self, planned: PlannedBatch) -> list[Place]:
        epoch = planned.pass_number if self._training else None
        return [Place(index, number, epoch) for number, row in enumerate(planned.rows) for index in row]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._training:
            self.batches_done = 0
        to_come, to_load = tee(self._rest_of_epoch())
        loader = DataLoader(
            self._dataset,
            batch_sampler=map(self._places, to_load),
            collate_fn=self._dataset.collate,
            **self._loading,
        )
        for batch, planned in zip(loader, to_come, strict=False):
            self.batches_done += 1
            yield batch if planned.has_samples else without_samples(batch)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule saves the place. Being there at all tells Lightning that it can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load here, see `state_dict`."""
