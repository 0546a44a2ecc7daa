"""The DiT and its loss: shapes, adaLN-zero, masks that keep padding out, samples that share a row."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import yaml

from diffusion_data.command_line import build_target, config_folder
from diffusion_data.errors import UserError
from diffusion_data.scripts.diffusion_lightning_module import (
    DiffusionLightningModule,
    LossOptions,
    OptimizerOptions,
    learning_rate_share,
)
from diffusion_data.scripts.dit import DiT, rotary_angles, rotate
from diffusion_data.scripts.ema import EmaOptions
from diffusion_data.scripts.rectified_flow import rectified_flow_loss, weight
from diffusion_data.scripts.sample_layout import SampleARow, without_padding

PATCH_CHANNELS, TEXT_DIM = 12, 10
LENGTHS, TOKENS = (6, 4), (3, 2)


def tiny_dit(trained: bool = True) -> DiT:
    """`trained`: no weight is zero any more, so that every input can matter."""
    torch.manual_seed(0)
    model = DiT(24, 2, 2, patch_channels=PATCH_CHANNELS, text_embedding_dim=TEXT_DIM)
    if trained:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_batch(seq_length: int = 6, text_length: int = 4, garbage: float = 0.0) -> dict[str, Any]:
    """Two samples of LENGTHS patches and TOKENS tokens; `garbage` fills their padding."""
    random = torch.Generator().manual_seed(1)
    video = torch.full((2, seq_length, PATCH_CHANNELS), garbage)
    text = torch.full((2, text_length, TEXT_DIM), garbage)
    mask, text_mask = torch.zeros(2, seq_length), torch.zeros(2, text_length)
    position_ids = torch.zeros(2, seq_length, 3, dtype=torch.int64)
    for sample, (length, tokens) in enumerate(zip(LENGTHS, TOKENS, strict=True)):
        video[sample, :length] = torch.randn(length, PATCH_CHANNELS, generator=random)
        text[sample, :tokens] = torch.randn(tokens, TEXT_DIM, generator=random)
        mask[sample, :length] = 1
        text_mask[sample, :tokens] = 1
        position_ids[sample, :length, 2] = torch.arange(length)
    return {
        "video": video.bfloat16(),
        "t5_text_embeddings": text.bfloat16(),
        "t5_text_mask": text_mask.bfloat16(),
        "loss_mask": mask.bfloat16(),
        "image_size": torch.tensor([[64.0, 96.0, 64.0, 96.0]] * 2).bfloat16(),
        "fps": torch.tensor([30.0, 24.0]).bfloat16(),
        "num_frames": torch.tensor([1.0, 17.0]).bfloat16(),
        "seq_len_q": torch.tensor(LENGTHS, dtype=torch.int32),
        "seq_len_kv": torch.tensor(TOKENS, dtype=torch.int32),
        "pos_ids": position_ids,
        "latent_shape": torch.tensor([[3, 1, 4, 12]] * 2, dtype=torch.int32),
        "__key__": ["a", "b"],
    }


def loss_of(model: DiT, batch: dict[str, Any]) -> float:
    """With the same noise at the same positions, however long the padding."""
    batch = without_padding(batch)
    noise = torch.randn(2, 64, PATCH_CHANNELS, generator=torch.Generator().manual_seed(2))
    noise = noise[:, : batch["video"].shape[1]]
    return rectified_flow_loss(model, batch, noise, torch.tensor([0.3, 0.8]), sigma_data=0.5).item()


def optimizer_options(**changed: Any) -> OptimizerOptions:
    options: dict[str, Any] = {
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_steps": 1,
        "decay_steps": 100,
        "final_learning_rate": 0.0,
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
    }
    return OptimizerOptions(**{**options, **changed})


def lightning_module(model: DiT) -> DiffusionLightningModule:
    ema = EmaOptions(decay=None, validate=False)
    return DiffusionLightningModule(
        model, LossOptions(sigma_data=0.5, timesteps="uniform"), optimizer_options(), ema, seed=0
    )


def test_prediction_has_the_shape_of_the_patches_and_is_zero_at_initialisation() -> None:
    model, batch = tiny_dit(trained=False), make_batch()
    seen: dict[str, torch.Tensor] = {}
    model.register_forward_hook(lambda module, inputs, output: seen.update(output=output))
    loss = loss_of(model, batch)

    assert seen["output"].shape == (2, 6, PATCH_CHANNELS)
    assert torch.equal(seen["output"], torch.zeros(2, 6, PATCH_CHANNELS))
    squares = [batch["video"][sample, :length].float().square().sum() for sample, length in enumerate(LENGTHS)]
    weights = weight(torch.tensor([0.3, 0.8]), sigma_data=0.5)
    expected = sum(square * each for square, each in zip(squares, weights, strict=True))
    assert loss == pytest.approx(expected.item() / PATCH_CHANNELS / sum(LENGTHS))  # as good as knowing nothing


def test_blocks_are_the_identity_at_initialisation() -> None:
    block = tiny_dit(trained=False).blocks[0]
    hidden = torch.randn(2, 6, 24)
    no_padding = SampleARow(None, None)

    angles = torch.randn(2, 1, 6, 6)
    assert torch.equal(block(hidden, torch.randn(2, 24), torch.randn(2, 6, 24), angles, no_padding), hidden)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_sees_how_far_apart_positions_are_not_where(axis: int) -> None:
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=random)

    def similarity(query_at: int, key_at: int) -> float:
        positions = torch.tensor([[[5, 6, 7], [5, 6, 7]]])
        positions[0, :, axis] = torch.tensor([query_at, key_at])
        angles = rotary_angles(positions, head_size=32)
        return (rotate(query, angles[:, :, :1]) * rotate(key, angles[:, :, 1:])).sum().item()

    assert similarity(4, 1) == pytest.approx(similarity(23, 20), abs=1e-4)
    apart = [similarity(20 + distance, 20) for distance in range(10)]
    assert max(apart) - min(apart) > 0.5
    assert similarity(9, 9) == pytest.approx((query * key).sum().item(), abs=1e-4)


@pytest.mark.parametrize(("seq_length", "text_length"), [(9, 4), (6, 7), (16, 32)])
def test_loss_does_not_depend_on_padding(seq_length: int, text_length: int) -> None:
    model = tiny_dit()

    padded = loss_of(model, make_batch(seq_length, text_length, garbage=7.0))

    assert padded == pytest.approx(loss_of(model, make_batch()), abs=1e-6)


def test_loss_is_the_mean_over_real_positions_of_the_samples_one_by_one() -> None:
    model, batch = tiny_dit(), make_batch()
    noise = torch.randn(2, 6, PATCH_CHANNELS, generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([0.3, 0.8])
    together = rectified_flow_loss(model, without_padding(batch), noise, timesteps, sigma_data=0.5)

    total = torch.zeros(())
    for sample, length in enumerate(LENGTHS):
        one = {key: value[sample : sample + 1] for key, value in batch.items()}
        one.update({key: one[key][:, :length] for key in ("video", "loss_mask", "pos_ids")})
        chosen = slice(sample, sample + 1)
        one = without_padding(one)
        total += length * rectified_flow_loss(model, one, noise[chosen, :length], timesteps[chosen], sigma_data=0.5)

    assert together.item() == pytest.approx(total.item() / sum(LENGTHS), abs=1e-6)


@pytest.mark.parametrize("key", ["t5_text_embeddings", "t5_text_mask", "pos_ids", "fps", "num_frames", "image_size"])
def test_everything_the_model_is_told_matters(key: str) -> None:
    model, batch = tiny_dit(), make_batch()
    changed = {**batch, key: batch[key].flip(0 if key == "fps" or key == "num_frames" else 1)}
    if key == "image_size":
        changed[key] = batch[key] * 2

    assert loss_of(model, changed) != pytest.approx(loss_of(model, batch), abs=1e-6)


def test_no_caption_at_all_is_finite() -> None:
    batch = make_batch()
    batch["t5_text_mask"] = torch.zeros_like(batch["t5_text_mask"])

    assert loss_of(tiny_dit(), batch) == loss_of(tiny_dit(), batch)  # not NaN


def test_gradients_reach_every_parameter_after_the_zeros_have_moved() -> None:
    module = lightning_module(tiny_dit(trained=False))
    optimizer = cast(dict[str, Any], module.configure_optimizers())["optimizer"]
    for step in range(4):
        optimizer.zero_grad()
        module.training_step(without_padding(make_batch()), step).backward()
        optimizer.step()

    unmoved = [name for name, value in module.model.named_parameters() if not value.grad.abs().sum() > 0]
    assert unmoved == []


def test_same_seed_draws_the_same_noise_and_the_next_batch_other_noise() -> None:
    first, second = lightning_module(tiny_dit()), lightning_module(tiny_dit())
    batch = without_padding(make_batch())

    losses = [first.training_step(batch, 0).item() for _ in range(2)]
    second.on_load_checkpoint({"micro_batches_done": 1})

    assert losses[0] != losses[1]
    assert second.training_step(batch, 0).item() == losses[1]


def test_trimming_leaves_out_only_what_is_padding_in_all_samples() -> None:
    batch = make_batch(seq_length=100, text_length=100)
    trimmed = without_padding(batch)

    assert trimmed["video"].shape == (2, 32, PATCH_CHANNELS)
    assert trimmed["pos_ids"].shape == (2, 32, 3)
    assert trimmed["t5_text_embeddings"].shape == (2, 32, TEXT_DIM)
    assert trimmed["loss_mask"].sum() == batch["loss_mask"].sum()
    assert trimmed["t5_text_mask"].sum() == batch["t5_text_mask"].sum()
    assert (trimmed["lengths"], trimmed["text_lengths"], trimmed["num_positions"]) == ([6, 4], [3, 2], 200)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [("constant", [0.25, 1.0, 1.0, 1.0, 1.0]), ("cosine", [0.25, 1.0, 0.55, 0.1, 0.1])],
)
def test_learning_rate_warms_up_and_then_follows_the_schedule(schedule: str, shares: list[float]) -> None:
    options = optimizer_options(schedule=schedule, warmup_steps=4, decay_steps=24, final_learning_rate=1e-3)

    assert [learning_rate_share(options, step) for step in (0, 4, 14, 24, 100)] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("name", "millions", "depth", "width"),
    [("tiny", 4, 4, 192), ("s", 41, 12, 384), ("b", 161, 12, 768), ("l", 562, 24, 1024), ("xl", 828, 28, 1152)],
)
def test_the_configs_are_the_sizes_that_the_documentation_names(
    name: str, millions: int, depth: int, width: int
) -> None:
    options = yaml.safe_load((config_folder() / "model" / f"dit_{name}.yaml").read_text())["model"]
    with torch.device("meta"):
        model = build_target(options, "model")

    assert (len(model.blocks), model.hidden_size) == (depth, width)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


def test_wrong_widths_name_the_option() -> None:
    model = DiT(24, 1, 2, patch_channels=8, text_embedding_dim=TEXT_DIM)
    with pytest.raises(UserError, match=r"model\.patch_channels=12"):
        loss_of(model, make_batch())

    model = DiT(24, 1, 2, patch_channels=PATCH_CHANNELS, text_embedding_dim=8)
    with pytest.raises(UserError, match=r"model\.text_embedding_dim=10"):
        loss_of(model, make_batch())
