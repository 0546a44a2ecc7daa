"""Encoded samples -> batches: the stages of energon's loader that don't look into a sample's parts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from megatron.energon import DefaultTaskEncoder, SavableDataset, TaskEncoder, WorkerConfig, stateless
from megatron.energon.metadataset.loader_interface import DatasetBlendMode, LoadedDataset
from megatron.energon.wrappers import EpochizeDataset, MapDataset

from diffusion_data.batch_layout import padded_batch
from diffusion_data.diffusion_sample import CookedSample, DiffusionSample
from diffusion_data.errors import UserError
from diffusion_data.late_reading import read_late
from diffusion_data.packed_layout import PackedSample, packed_batch, rounded_up
from diffusion_data.packing import FullPacking
from diffusion_data.safe_decoder import SafeDecoder
from diffusion_data.sequence_packing import pack_sequences
from diffusion_data.shared_counts import PositionCounts
from diffusion_data.skip_counts import SkipCounts, StopWhenAllSkipped
from diffusion_data.text_dropout import uniform_of_call
from diffusion_data.training_stream import training_stream


class DiffusionStages(DefaultTaskEncoder[CookedSample, DiffusionSample, dict, dict]):
    """`BasicDiffusionTaskEncoder` without the encoding of single samples; its options are explained there."""

    text_embedding_padding_size: int
    text_padding: str
    seq_length: int | None
    max_seq_length: int | None
    bucket_by_shape: bool
    length_multiple: int
    text_dropout: float
    skips: SkipCounts

    encode_batch = TaskEncoder.encode_batch  # that of DefaultTaskEncoder, which does nothing either, costs a stage

    def __init__(self) -> None:
        super().__init__()
        self.positions = PositionCounts()
        self.empty_text: torch.Tensor | None = None
        """bfloat16 (L, E): what text_dropout puts in a caption's place."""

    def drop_text(self, sample: DiffusionSample, chance: float) -> DiffusionSample:
        """The sample with the empty caption, if `chance`, evenly distributed over [0, 1), is below text_dropout."""
        if chance >= self.text_dropout:
            return sample
        assert self.empty_text is not None
        text = self.empty_text[: self.text_embedding_padding_size]
        width = sample.text_and_room.shape[1]
        if text.shape[1] != width:
            raise UserError(
                f"the empty caption is {text.shape[1]} wide, the text of {sample.__key__} {width}: they are of "
                "different text encoders"
            )
        text_and_room = torch.empty(self._text_room(len(text)), width, dtype=torch.bfloat16)
        text_and_room[: len(text)] = text
        return DiffusionSample.extend(sample, text_and_room=text_and_room, seq_len_kv=len(text))

    @stateless
    def _maybe_drop_text(self, sample: DiffusionSample) -> DiffusionSample:
        return self.drop_text(sample, uniform_of_call())

    @stateless
    def batch(self, samples: Sequence[DiffusionSample] | Sequence[PackedSample]) -> dict[str, Any]:
        if isinstance(samples[0], PackedSample):
            rows = [packed.samples for packed in samples]
            batch = packed_batch(rows, length=self._padded(self.max_seq_length), multiple=self.length_multiple)
        else:
            text_length = self.text_embedding_padding_size
            if self.text_padding == "longest":
                text_length = max(sample.seq_len_kv for sample in samples)
            length = None if self.bucket_by_shape else self.seq_length
            if length is None:
                length = max(sample.seq_len_q for sample in samples)
            batch = padded_batch(samples, length=self._padded(length), text_length=self._padded(text_length))
        self.positions.add(used=sum(batch["seq_len_q"].tolist()), total=batch["loss_mask"].numel())
        return batch

    def select_samples_to_pack(self, samples: Sequence[DiffusionSample]) -> list[list[DiffusionSample]]:
        """Which of the buffer's samples share a sequence. Draws no random numbers, so that a resume finds the same."""
        lengths = [self._padded(sample.seq_len_q) for sample in samples]
        packs = pack_sequences(lengths, self._padded(self.max_seq_length))
        # Longest first, as they are found, would sort the buffer; where its longest sample stood is random.
        packs.sort(key=lambda pack: pack[0])
        return [[samples[position] for position in sorted(pack)] for pack in packs]

    @stateless
    def pack_selected_samples(self, samples: Sequence[DiffusionSample]) -> PackedSample:
        return PackedSample.of(samples)

    def batch_group_criterion(self, sample: DiffusionSample) -> tuple[Hashable, None]:
        return sample.latent_shape, None

    def _is_overridden(self, bound_method: Any, bases: Any = None) -> bool:
        """How energon finds out whether to group: only if that was asked for."""
        if getattr(bound_method, "__func__", None) is DiffusionStages.batch_group_criterion:
            return self.bucket_by_shape
        return super()._is_overridden(bound_method, bases)

    def _padded(self, length: int | None) -> int:
        """`length`, or a bit more, so that tensor- and context-parallel ranks can share it out."""
        assert length is not None
        return rounded_up(length, self.length_multiple)

    def _text_room(self, tokens: int) -> int:
        """Rows to make at once for a text, so that a batch of one needs no copy; samples that wait get none beyond."""
        waits = self.max_seq_length is not None or self.text_padding == "longest"
        return self._padded(tokens if waits else self.text_embedding_padding_size)

    def build_batch(
        self,
        dataset: SavableDataset[Any],
        *,
        worker_config: WorkerConfig,
        packing_buffer_size: int | None = None,
        **batching: Any,
    ) -> SavableDataset[Any]:
        if packing_buffer_size is not None:
            dataset = FullPacking(
                dataset,
                buffer_size=packing_buffer_size,
                pre_packer=self.select_samples_to_pack,
                final_packer=self.pack_selected_samples,
                final_packer_stateless=True,
                worker_config=worker_config,
            )
        return super().build_batch(dataset, worker_config=worker_config, **batching)

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
        blend_mode: DatasetBlendMode = DatasetBlendMode.NONE,
        repeat: bool = True,
        **batching: Any,
    ) -> SavableDataset[Any]:
        """energon's stages, but for the order of samples (see `training_stream`)."""
        stream = training_stream(
            datasets,
            lambda dataset, rotation: self._load_dataset(dataset, rotation, worker_config),
            blend_mode=blend_mode,
            shuffle_buffer_size=shuffle_buffer_size,
            repeat=repeat,
            worker_config=worker_config,
        )
        stream = self.build_encode_sample(stream, worker_config=worker_config)
        if self.text_dropout > 0:
            stream = MapDataset(stream, self._maybe_drop_text, stateless_map_fn=True, worker_config=worker_config)
        stream = self.build_batch(stream, batch_size=batch_size, worker_config=worker_config, **batching)
        if virtual_epoch_length > 0:
            stream = EpochizeDataset(stream, length=virtual_epoch_length, worker_config=worker_config)
        return stream
