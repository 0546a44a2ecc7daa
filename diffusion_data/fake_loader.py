"""Which fake samples come in which batch of which rank, the same on every rank, and the loader of a rank's batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

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


class FakeLoader:
    """Batches of one data-parallel rank; every rank has equally many.

    Training: a new order each epoch, the tail that doesn't fill a step of all ranks is left out. Where samples are
    packed or bucketed, it is the batches whose order is new. A pass that a checkpoint interrupted goes on where it
    was. Validation: every sample once, in order, from the start each time; ranks with fewer batches end with batches
    without samples.
    """

    def __init__(
        self,
        dataset: FakeLatents,
        planner: BatchPlanner,
        parallel: DataParallel,
        *,
        batches_a_step: int | None,
        seed: int,
        keeps_samples_together: bool,
        **loading: Any,
    ) -> None:
        self._dataset = dataset
        self._planner = planner
        self._parallel = parallel
        self._batches_a_step = batches_a_step  # of all ranks; None: validation
        self._seed = seed
        self._keeps_samples_together = keeps_samples_together
        self._loading = loading
        self.epoch = 0
        self.batches_done = 0
        self._fixed = planner.batches(range(len(dataset))) if keeps_samples_together else None
        self._length = len(self._batches()) if batches_a_step else -(-len(self._all_batches()) // parallel.size)
        if self._length == 0:
            raise UserError(
                f"{len(dataset)} fake samples don't fill one step on {parallel.size} ranks; raise num_train_samples"
            )

    def _all_batches(self) -> list[BatchPlan]:
        """Of all ranks, in this epoch."""
        if self._batches_a_step is None:
            return self._fixed or self._planner.batches(range(len(self._dataset)))
        rng = np.random.default_rng([self._seed, self.epoch])
        if self._fixed is not None:
            batches = [self._fixed[number] for number in rng.permutation(len(self._fixed))]
        else:
            batches = self._planner.batches(rng.permutation(len(self._dataset)).tolist())
        full = max((len(batch) for batch in batches), default=0)
        batches = [batch for batch in batches if len(batch) == full]
        return batches[: len(batches) // self._batches_a_step * self._batches_a_step]

    def _batches(self) -> list[BatchPlan]:
        """Of this rank, in this epoch."""
        return self._all_batches()[self._parallel.rank :: self._parallel.size]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        training = self._batches_a_step is not None
        if not training:
            self.batches_done = 0
        batches = self._batches()
        with_samples = len(batches)
        batches += (batches or self._all_batches())[:1] * (self._length - with_samples)
        epoch = self.epoch if training else None
        loader = DataLoader(
            self._dataset,
            batch_sampler=[
                [Place(index, number, epoch) for number, row in enumerate(batch) for index in row]
                for batch in batches[self.batches_done :]
            ],
            collate_fn=self._dataset.collate,
            **self._loading,
        )
        for batch in loader:
            has_samples = self.batches_done < with_samples
            self.batches_done += 1
            if self.batches_done == self._length:
                self.epoch, self.batches_done = self.epoch + 1, 0
            yield batch if has_samples else without_samples(batch)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the datamodule saves the place. Being there at all tells Lightning that it can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load here, see `state_dict`."""
