"""Packed batches: the real DiT sees in samples that share a row what it sees in each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.energon_loaders import without_samples
from diffusion_data.patchify import position_ids_3d
from diffusion_data.scripts.dit import DiT
from diffusion_data.scripts.rectified_flow import rectified_flow_loss
from diffusion_data.scripts.sample_layout import SampleARow, layout_of, without_padding
from tests.datamodules import module

PATCH_CHANNELS, TEXT_DIM = 12, 10
SHAPES = ((1, 2, 3), (2, 2, 2), (1, 1, 5), (3, 1, 2), (1, 4, 4))
"""(t, h, w) in patches of samples of 6, 8, 5, 6 and 16 patches."""
TOKENS = (3, 1, 4, 2, 5)
GARBAGE = 9.0

Samples = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> DiT:
    """No weight is zero, so that everything matters."""
    torch.manual_seed(0)
    model = DiT(48, 2, 4, patch_channels=PATCH_CHANNELS, text_embedding_dim=TEXT_DIM)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def samples() -> Samples:
    random = torch.Generator().manual_seed(1)
    return [
        {
            "video": torch.randn(t * h * w, PATCH_CHANNELS, generator=random).bfloat16(),
            "pos_ids": position_ids_3d(t, h, w),
            "text": torch.randn(tokens, TEXT_DIM, generator=random).bfloat16(),
            "latent_shape": [3, t, 2 * h, 2 * w],
            "image_size": [16.0 * h, 16.0 * w] * 2,
            "fps": 20.0 + number,
            "num_frames": 1.0 + 8 * (t - 1),
            "noise": torch.randn(t * h * w, PATCH_CHANNELS, generator=random),
            "timestep": 0.1 + 0.2 * number,
        }
        for number, ((t, h, w), tokens) in enumerate(zip(SHAPES, TOKENS, strict=True))
    ]


def packed(samples: Samples, samples_a_row: list[int], multiple: int = 1) -> dict[str, Any]:
    """The batch that the task encoder packs; each sample is padded to a `multiple`, each row to the same length."""
    ends = list(accumulate(samples_a_row))
    rows = [samples[end - count : end] for end, count in zip(ends, samples_a_row, strict=True)]
    batch: dict[str, Any] = {}
    for part, keys, mask in (
        ("q", {"video": "video", "pos_ids": "pos_ids"}, "loss_mask"),
        ("kv", {"text": "t5_text_embeddings"}, "t5_text_mask"),
    ):
        lengths = [len(sample[next(iter(keys))]) for sample in samples]
        room = [-(-length // multiple) * multiple for length in lengths]
        of_rows = [room[end - count : end] for end, count in zip(ends, samples_a_row, strict=True)]
        width = max(map(sum, of_rows)) + 7
        begins = [row * width + begin for row, of in enumerate(of_rows) for begin in accumulate([0, *of[:-1]])]
        for key, name in keys.items():
            values = torch.full((len(rows) * width, *samples[0][key].shape[1:]), GARBAGE, dtype=samples[0][key].dtype)
            for begin, sample in zip(begins, samples, strict=True):
                values[begin : begin + len(sample[key])] = sample[key]
            batch[name] = values.unflatten(0, (len(rows), width))
        batch[mask] = torch.zeros(len(rows) * width, dtype=torch.bfloat16)
        for begin, length in zip(begins, lengths, strict=True):
            batch[mask][begin : begin + length] = 1
        batch[mask] = batch[mask].view(len(rows), width)
        batch[f"seq_len_{part}"] = torch.tensor(lengths, dtype=torch.int32)
        batch[f"cu_seqlens_{part}"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        batch[f"cu_seqlens_{part}_padded"] = torch.tensor([*begins, len(rows) * width], dtype=torch.int32)
    for key in ("image_size", "fps", "num_frames"):
        batch[key] = torch.tensor([sample[key] for sample in samples])
    batch["latent_shape"] = torch.tensor([sample["latent_shape"] for sample in samples], dtype=torch.int32)
    batch["__key__"] = [f"sample {number}" for number in range(len(samples))]
    return batch


def alone(sample: dict[str, Any]) -> dict[str, Any]:
    """The unpacked batch of one sample."""
    batch = packed([sample], [1])
    return {key: value for key, value in batch.items() if not key.startswith("cu_seqlens")}


def loss(model: DiT, samples: Samples, batch: dict[str, Any]) -> torch.Tensor:
    batch = without_padding(batch)
    noise = torch.zeros(batch["video"].shape)
    real = torch.cat([sample["noise"] for sample in samples])
    noise[:, : len(real)] = real
    timesteps = torch.tensor([sample["timestep"] for sample in samples])
    return rectified_flow_loss(model, batch, noise, timesteps, sigma_data=0.5)


@pytest.mark.parametrize(("samples_a_row", "multiple"), [([5], 1), ([3, 2], 1), ([1, 3, 1], 1), ([3, 2], 4)])
def test_packed_batch_has_the_loss_and_gradients_of_its_samples_one_by_one(
    model: DiT, samples: Samples, samples_a_row: list[int], multiple: int
) -> None:
    model.zero_grad()
    together = loss(model, samples, packed(samples, samples_a_row, multiple))
    together.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model.zero_grad()
    positions = sum(len(sample["video"]) for sample in samples)
    losses = [loss(model, [sample], alone(sample)) * len(sample["video"]) / positions for sample in samples]
    torch.stack(losses).sum().backward()

    assert together.item() == pytest.approx(torch.stack(losses).sum().item(), rel=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_batches_that_the_loader_packs_have_the_loss_of_their_samples_one_by_one(
    make_tiny_dataset: Callable[..., Path],
) -> None:
    """Pictures and clips from disk, through the real packer, against the same served singly; in float32."""
    dataset = make_tiny_dataset(14)
    torch.manual_seed(0)
    model = DiT(48, 2, 4, patch_channels=16, text_embedding_dim=8)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    def batches(**options: Any) -> list[dict[str, Any]]:
        encoder = BasicDiffusionTaskEncoder(latent_scaling="per_channel", text_embedding_padding_size=6)
        return list(module(dataset, use_train_split_for_val=True, task_encoder=encoder, **options).val_dataloader())

    def loss_of(batch: dict[str, Any]) -> float:
        batch = without_padding(batch)
        noise = torch.zeros(batch["video"].shape)
        rows = [int(key[-9:]) for key in batch["__key__"]]
        each = [
            torch.randn(length, 16, generator=torch.Generator().manual_seed(row))
            for row, length in zip(rows, batch["lengths"], strict=True)
        ]
        noise[:, : sum(batch["lengths"])] = torch.cat(each)
        timesteps = torch.tensor([(row + 1) / 16 for row in rows])
        return rectified_flow_loss(model, batch, noise, timesteps, sigma_data=0.5).item()

    singly = {batch["__key__"][0]: (loss_of(batch), int(batch["seq_len_q"][0])) for batch in batches()}
    packed_batches = batches(max_seq_length=24, packing_buffer_size=7, micro_batch_size=2, global_batch_size=2)

    assert sorted(key for batch in packed_batches for key in batch["__key__"]) == sorted(singly)
    assert max(len(batch["__key__"]) for batch in packed_batches) > 2  # in two rows
    for batch in packed_batches:
        own = [singly[key] for key in batch["__key__"]]
        expected = sum(loss * length for loss, length in own) / sum(length for _, length in own)
        assert loss_of(batch) == pytest.approx(expected, abs=1e-4)


def test_each_sample_has_the_loss_it_has_alone(model: DiT, samples: Samples) -> None:
    """A mean of all could hide errors that cancel: here all other samples' positions are left out of it."""
    for number, sample in enumerate(samples):
        batch = packed(samples, [3, 2])
        start = int(batch["cu_seqlens_q_padded"][number])
        mask = torch.zeros_like(batch["loss_mask"]).flatten()
        mask[start : start + len(sample["video"])] = 1
        batch["loss_mask"] = mask.view_as(batch["loss_mask"])

        expected = loss(model, [sample], alone(sample)).item()
        assert loss(model, samples, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("key", ["video", "text", "timestep", "fps", "image_size"])
def test_what_changes_in_one_sample_changes_nothing_in_another(model: DiT, samples: Samples, key: str) -> None:
    def loss_of_first(others: Samples) -> float:
        batch = packed([samples[0], *others], [3])
        batch["loss_mask"][:, len(samples[0]["video"]) :] = 0
        return loss(model, [samples[0], *others], batch).item()

    changed = {"timestep": 0.9, "fps": 3.0, "image_size": [900.0, 8.0] * 2}.get(key)
    other = {**samples[1], key: samples[1][key] + 1 if changed is None else changed}

    assert loss_of_first([other, samples[2]]) == loss_of_first([samples[1], samples[2]])


def test_no_padding_is_left_of_a_packed_batch(samples: Samples) -> None:
    batch = without_padding(packed(samples, [3, 2]))

    assert batch["video"].shape == (1, 41, PATCH_CHANNELS)
    assert batch["t5_text_embeddings"].shape == (1, 15, TEXT_DIM)
    assert not (batch["video"] == GARBAGE).any()
    assert batch["loss_mask"].all()
    assert (batch["lengths"], batch["text_lengths"]) == ([6, 8, 5, 6, 16], [3, 1, 4, 2, 5])
    assert batch["num_positions"] == 2 * (6 + 16 + 7)  # what the loader gave
    of_samples = chain.from_iterable([number] * length for number, length in enumerate(batch["lengths"]))
    assert layout_of(batch).spread(torch.arange(5.0)[:, None]).flatten().tolist() == list(of_samples)


@pytest.mark.parametrize("make", [lambda samples: packed(samples, [3, 2]), lambda samples: alone(samples[0])])
def test_a_batch_without_samples_counts_for_nothing(
    model: DiT, samples: Samples, make: Callable[[Samples], dict[str, Any]]
) -> None:
    """What a rank that has fewer samples than others is given at the end of a pass."""
    batch = make(samples)
    nothing = without_samples(batch)
    model.zero_grad()
    without = loss(model, samples[: len(batch["__key__"])], nothing)
    without.backward()

    assert without.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    counts = without_padding(nothing)
    assert (counts["num_samples"], counts["num_tokens"]) == (0, 0)


def test_samples_of_one_length_are_attended_to_without_a_mask(model: DiT, samples: Samples) -> None:
    """Only without one do the quickest kernels take a batch of a bucket."""
    batch = without_padding(alone(samples[0]))
    layout = layout_of(batch)
    assert isinstance(layout, SampleARow)
    assert layout.mask is not None
    full = {key: value[:, :6] if key in ("video", "loss_mask", "pos_ids") else value for key, value in batch.items()}

    layout = layout_of(full)
    assert isinstance(layout, SampleARow)
    assert layout.mask is None
    assert loss(model, [samples[0]], full).item() == pytest.approx(loss(model, [samples[0]], batch).item(), rel=1e-6)
