"""No dataset -> batches like a real dataset's, from random latents and texts.

Random `LatentSample`s go through the real task encoder, so keys, shapes and dtypes are the real ones by
construction. Sample i of a seed is always the same, whatever the ranks, workers and batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.fake_latents import FakeLatents
from diffusion_data.fake_loader import BatchPlanner, FakeLoader
from diffusion_data.fake_shapes import ModelInput
from diffusion_data.latent_datamodule import LatentDataModule
from diffusion_data.latent_scaling import PER_CHANNEL, LatentScaling
from diffusion_data.loader_state import refuse_changes, refuse_foreign
from diffusion_data.packing import agreed
from diffusion_data.parallel_ranks import DataParallel


class VideoLatentFakeDataModule(LatentDataModule):
    """Random latents in place of a dataset, to try, test and time a model.

    Takes what DiffusionDataModule takes. Positional arguments are NeMo's, in their order.

    model_config: what to imitate, NeMo's DiTConfig or anything with its in_channels, patch_spatial, crossattn_emb_size,
        max_frames, max_img_h and max_img_w
    seq_length: patches each sample is padded to; None takes the longest of latent_shapes
    num_train_samples, num_val_samples, num_test_samples: how many a split has; no two splits share any
    latent_shapes: (C, T, H, W) to draw from; T = 1 is a picture. None: a square picture, a wide one and a clip
        that fit model_config and seq_length
    text_lengths: fewest and most tokens of a text
    text_embedding_dim: width of the text encoder that is imitated; None for model_config's, else 1024, T5-11B's
    virtual_epoch_length: batches a rank and epoch; None for one pass over the train samples, but for those that
        don't fill a step of the optimizer
    packing_buffer_size: samples to choose from to fill sequences
    seed: of the samples and their order, and of text dropout
    path, max_samples_per_sequence, shuffle_buffer_size, read_ahead: DiffusionDataModule's, without effect: nothing is
        read, and the order of each pass is wholly random

    The others are those of `LatentDataModule`.
    """

    def __init__(
        self,
        model_config: Any = None,
        seq_length: int | None = 2048,
        micro_batch_size: int = 1,
        global_batch_size: int = 8,
        num_workers: int = 1,
        pin_memory: bool = True,
        task_encoder: BasicDiffusionTaskEncoder | None = None,
        use_train_split_for_val: bool = False,
        *,
        num_train_samples: int = 10_000,
        num_val_samples: int = 64,
        num_test_samples: int = 64,
        latent_shapes: Sequence[Sequence[int]] | None = None,
        text_lengths: Sequence[int] = (4, 80),
        text_embedding_dim: int | None = None,
        path: Any = None,
        virtual_epoch_length: int | None = None,
        packing_buffer_size: int | None = None,
        max_samples_per_sequence: int | None = None,
        max_seq_length: int | None = None,
        bucket_by_shape: bool = False,
        shuffle_buffer_size: int = 100,
        read_ahead: int = 4,
        repeat: bool = True,
        seed: int = 0,
        parallel: DataParallel | None = None,
        device_mesh: Any = None,
    ) -> None:
        model = ModelInput.of(model_config)
        if task_encoder is None and model.patch_spatial is not None:
            task_encoder = BasicDiffusionTaskEncoder(patch_spatial=model.patch_spatial)
        super().__init__(
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            task_encoder=task_encoder,
            use_train_split_for_val=use_train_split_for_val,
            virtual_epoch_length=virtual_epoch_length,
            packing_buffer_size=packing_buffer_size,
            max_samples_per_sequence=max_samples_per_sequence,
            max_seq_length=max_seq_length,
            bucket_by_shape=bucket_by_shape,
            shuffle_buffer_size=shuffle_buffer_size,
            read_ahead=read_ahead,
            repeat=repeat,
            seed=seed,
            parallel=parallel,
            device_mesh=device_mesh,
        )
        encoder = self.task_encoder
        agreed("patch_spatial", model.patch_spatial, encoder.patch_spatial)
        encoder.max_seq_length, encoder.bucket_by_shape = self.max_seq_length, self.bucket_by_shape
        if latent_shapes is None:
            most_patches = min(seq_length or encoder.seq_length or 2048, self.max_seq_length or 2**63)
            latent_shapes = model.shapes_that_fit(most_patches, encoder.patch_spatial, encoder.patch_temporal)
        elif model_config is not None:
            model.refuse_unfit(latent_shapes)
        self.seq_length = encoder.seq_length = self._fitting_length(seq_length, latent_shapes)
        fewest, most = text_lengths
        if not 1 <= fewest <= most:
            raise UserError(f"text_lengths must be two numbers, 1 <= fewest <= most, got {list(text_lengths)}")
        self.model_config = model_config
        self.num_train_samples = num_train_samples
        self.num_val_samples = num_val_samples
        self.num_test_samples = num_test_samples
        self.latent_shapes = [tuple(shape) for shape in latent_shapes]
        self.text_lengths = (fewest, most)
        self.text_embedding_dim = model.text_embedding_dim if text_embedding_dim is None else text_embedding_dim
        self.path = path
        self._train: FakeLoader | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def latent_scaling(self) -> LatentScaling | None:
        """What was done to the latents, with its inverse for decoding; None if they are raw.

        Fake latents are standard normal, so that `per_channel` changes nothing.
        """
        if self.task_encoder.latent_scaling == PER_CHANNEL and self.task_encoder.scaling is None:
            channels = self.latent_shapes[0][0]
            return LatentScaling(shift=torch.zeros(channels), scale=torch.ones(channels))
        return self.task_encoder.scaling

    def train_dataloader(self) -> FakeLoader:
        """The training stream; each call goes on with the same one."""
        if self._train is None:
            self.gradient_accumulation_steps  # noqa: B018 - refuses batch sizes that don't fit the ranks
            train = self._loader(self.num_train_samples, self.seed, training=True)
            if self._saved is not None:
                refuse_changes(self._saved["settings"], self._stream_settings(train))
                train.batches_done = self._saved["batches_done"]
            self._train = train
        return self._train

    def val_dataloader(self) -> FakeLoader | list[Any]:
        """One pass over the validation samples; an empty list if there are none."""
        if self.use_train_split_for_val:
            return self._loader(self.num_train_samples, self.seed)
        return self._loader(self.num_val_samples, self.seed + 1) if self.num_val_samples else []

    def test_dataloader(self) -> FakeLoader | list[Any]:
        """One pass over the test samples; an empty list if there are none."""
        return self._loader(self.num_test_samples, self.seed + 2) if self.num_test_samples else []

    def state_dict(self) -> dict[str, Any]:
        """The place in the training stream; the same on all ranks."""
        if self._train is None:
            return self._saved or {}
        return {"batches_done": self._train.batches_done, "settings": self._stream_settings(self._train)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place for `train_dataloader`, which goes there.

        Raises:
            UserError: it is no such place, as one of a DiffusionDataModule.
        """
        if state_dict:
            refuse_foreign(state_dict, {"batches_done", "settings"}, type(self).__name__)
        self._saved, self._train = state_dict or None, None

    def _stream_settings(self, train: FakeLoader) -> dict[str, Any]:
        """Everything that decides which samples come in which order; workers don't."""
        return {
            "data_parallel_size": self._parallel().size,
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "packing_buffer_size": self.packing_buffer_size,
            "repeat": self.repeat,
            "virtual_epoch_length": len(train),
            "num_train_samples": self.num_train_samples,
            "latent_shapes": [list(shape) for shape in self.latent_shapes],
            "text_lengths": list(self.text_lengths),
            "text_embedding_dim": self.text_embedding_dim,
            "seed": self.seed,
            **self.task_encoder.settings(),
        }

    def _loader(self, num_samples: int, seed: int, training: bool = False) -> FakeLoader:
        self.task_encoder.length_multiple = self._length_multiple()
        dataset = FakeLatents(
            self.task_encoder,
            num_samples,
            latent_shapes=self.latent_shapes,
            text_lengths=self.text_lengths,
            text_embedding_dim=self.text_embedding_dim,
            seed=seed,
        )
        planner = BatchPlanner(dataset, self.task_encoder, self.micro_batch_size, self.packing_buffer_size)
        return FakeLoader(
            dataset,
            planner,
            self._parallel(),
            training=training,
            batches_a_step=self.global_batch_size // self.micro_batch_size if training and self.repeat else None,
            epoch_length=self.virtual_epoch_length if training else None,
            seed=seed,
            keeps_samples_together=self.packing_buffer_size is not None or self.bucket_by_shape,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
        )

    def _fitting_length(self, asked: int | None, shapes: Sequence[Sequence[int]]) -> int:
        """seq_length; every shape has to fit, since a map-style dataset can't skip."""
        lengths = [self.task_encoder.sequence_length_of(shape) for shape in shapes]
        if not lengths or None in lengths:
            raise UserError("latent_shapes must be (C, T, H, W) that whole patches cover")
        longest = max(length for length in lengths if length is not None)
        length = asked or self.task_encoder.seq_length or longest
        if self.task_encoder.max_seq_length is not None and longest > self.task_encoder.max_seq_length:
            raise UserError(
                f"a latent of latent_shapes becomes {longest} patches, more than "
                f"max_seq_length={self.task_encoder.max_seq_length}; raise it or choose smaller latent_shapes"
            )
        if longest > length:
            raise UserError(
                f"a latent of latent_shapes becomes {longest} patches, more than seq_length={length}; "
                "raise seq_length or choose smaller latent_shapes"
            )
        return length
