"""The loaded tokenizer gives the latents and frames of the network that was saved, from every layout and name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion_data.assets import bundled
from diffusion_data.cosmos_tokenizer import CosmosTokenizer, hub_name, scale_pixels
from diffusion_data.errors import UserError
from tests.fake_hub import running_hub
from tests.original_cosmos_network import PUBLISHED, OriginalConfig, original_network, save_traced, tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

VARIANTS = list(PUBLISHED)


def random_frames(config: OriginalConfig, num_latent_frames: int = 3, batch: int = 1) -> torch.Tensor:
    num_frames = 1 + (num_latent_frames - 1) * config.temporal_compression
    height, width = 2 * config.spatial_compression, 3 * config.spatial_compression
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module, nn.Module]]:
    """For each variant: the folder with encoder.jit and decoder.jit, and the networks saved there."""
    nets = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp("jit") / "weights"  # nothing in the name tells the variant
        encoder, decoder = original_network(tiny(variant))
        save_traced(encoder, decoder, scale_pixels(random_frames(tiny(variant), 2), torch.float32), folder)
        nets[variant] = (folder, encoder, decoder)
    return nets


@pytest.fixture
def folder(saved: dict, tmp_path: Path) -> Path:
    """A copy of the CV4x8x8 folder, to damage."""
    return shutil.copytree(saved["CV4x8x8"][0], tmp_path / "copy")


@pytest.mark.parametrize("num_latent_frames", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_latents_and_frames_as_the_original_network(saved: dict, variant: str, num_latent_frames: int) -> None:
    folder, encoder, decoder = saved[variant]
    config = tiny(variant)
    frames = random_frames(config, num_latent_frames, batch=2)
    pixels = frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        expected_latents = encoder(pixels)
        expected_pixels = decoder(expected_latents)

    tokenizer = CosmosTokenizer.from_pretrained(folder)
    latents = tokenizer.network.encode(pixels).latent_dist.mode()
    assert expected_latents.std() > 0.05
    assert (latents - expected_latents).abs().max() <= 1e-5
    decode_error = (tokenizer.network.decode(latents).sample - expected_pixels).abs().max()
    assert decode_error <= 1e-5 * expected_pixels.abs().max()

    encoded = tokenizer.encode(frames)
    assert encoded.dtype == torch.bfloat16
    # Rounded from a value within 1e-5; which way a value near the middle goes depends on the processor.
    torch.testing.assert_close(encoded.float(), latents, rtol=2**-8, atol=1e-5)
    expected_frames = ((expected_pixels.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 4, 1)
    decoded = tokenizer.decode(expected_latents)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, frames.shape)
    assert (decoded.float() - expected_frames).abs().max() < 0.51


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_is_read_off_the_weights(saved: dict, variant: str) -> None:
    tokenizer = CosmosTokenizer.from_pretrained(saved[variant][0])
    assert tokenizer.temporal_compression == PUBLISHED[variant].temporal_compression
    assert tokenizer.spatial_compression == PUBLISHED[variant].spatial_compression
    assert tokenizer.latent_channels == 16
    assert tokenizer.network.config.patch_size == PUBLISHED[variant].patch_size
    assert tokenizer.network.config.latents_mean is None


def test_without_decoder_its_file_is_not_needed(folder: Path) -> None:
    frames = random_frames(tiny("CV4x8x8"))
    expected = CosmosTokenizer.from_pretrained(folder)
    (folder / "decoder.jit").unlink()
    tokenizer = CosmosTokenizer.from_pretrained(folder, decoder=False)
    assert torch.equal(tokenizer.encode(frames), expected.encode(frames))
    assert tokenizer.weight_files == expected.weight_files == [folder / "encoder.jit"]
    assert not any(name.startswith("decoder") for name in tokenizer.network.state_dict())
    with pytest.raises(ValueError, match="decoder=False"):
        tokenizer.decode(tokenizer.encode(frames))


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "decoder.jit").unlink()
    with pytest.raises(UserError, match=f"no tokenizer in {folder}: looked for encoder.jit and decoder.jit, or config"):
        CosmosTokenizer.from_pretrained(folder)
    (folder / "encoder.jit").unlink()
    with pytest.raises(UserError, match=f"no tokenizer in {folder}: looked for encoder.jit, or config.json and diff"):
        CosmosTokenizer.from_pretrained(folder, decoder=False)
    for nowhere in ("no-such-model", str(tmp_path / "nowhere"), tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(
            UserError, match=r"no such model: .*(nowhere|no-such-model) is neither .* looked for encoder\.jit"
        ):
            CosmosTokenizer.from_pretrained(nowhere)


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_diffusers_layout(saved: dict, tmp_path: Path, subfolder: str) -> None:
    tokenizer = CosmosTokenizer.from_pretrained(saved["CV4x8x8"][0])
    tokenizer.network.register_to_config(latents_mean=[3.0] * 16, latents_std=[7.0] * 16)
    tokenizer.network.save_pretrained(tmp_path / subfolder)
    again = CosmosTokenizer.from_pretrained(tmp_path)
    frames = random_frames(tiny("CV4x8x8"))
    assert torch.equal(again.encode(frames), tokenizer.encode(frames))
    assert again.network.config.latents_mean is None
    assert [file.name for file in again.weight_files] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert all(file.is_file() for file in again.weight_files)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="describes a AutoencoderKL, expected an Auto"):
        CosmosTokenizer.from_pretrained(tmp_path)


def test_bundled_name() -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    assert (tokenizer.name, tokenizer.temporal_compression, tokenizer.spatial_compression) == ("tiny-cosmos", 4, 8)
    grey = torch.full((1, 1, 64, 64, 3), 128, dtype=torch.uint8)
    assert (tokenizer.decode(tokenizer.encode(grey)).float() - 128).abs().mean() < 10


def test_causal_in_time() -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    frames = torch.randint(0, 256, (1, 13, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, start = tokenizer.encode(frames), tokenizer.encode(frames[:, :9])
    torch.testing.assert_close(start, whole[:, :, :3], atol=0.01, rtol=0.02)  # a rounding of bfloat16
    assert not torch.allclose(whole[:, :, 2].float(), whole[:, :, 3].float(), atol=0.1)


def test_latents_are_bfloat16_and_frames_uint8(saved: dict) -> None:
    tokenizer = CosmosTokenizer.from_pretrained(saved["CV8x16x16"][0])
    frames = random_frames(tiny("CV8x16x16"), num_latent_frames=2, batch=3)
    latents = tokenizer.encode(frames)
    assert (latents.dtype, latents.shape) == (torch.bfloat16, (3, 16, 2, 2, 3))
    assert not latents.requires_grad
    assert (tokenizer.dtype, tokenizer.device) == (torch.float32, torch.device("cpu"))
    assert tokenizer.decode(latents).shape == frames.shape
    assert tokenizer.decode(latents.float()).dtype == torch.uint8


def test_refuses_float16_on_the_cpu(saved: dict) -> None:
    with pytest.raises(UserError, match="can't compute in float16 on a CPU"):
        CosmosTokenizer.from_pretrained(saved["CV4x8x8"][0], dtype=torch.float16)


def test_pixels_are_scaled_to_minus_one_and_one() -> None:
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1, 1).expand(1, 16, 16, 1, 3)
    expected = (torch.arange(256).reshape(1, 1, 16, 16, 1).double() / 127.5 - 1).expand(1, 3, 16, 16, 1)
    pixels = scale_pixels(frames, torch.float32)
    assert pixels.is_contiguous()
    assert pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() < 2e-7
    assert (scale_pixels(frames, torch.bfloat16) - expected).abs().max() <= 2**-9


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        ((1, 2, 32, 32, 3), r"1 \+ k \* 4 frames, got 2"),
        ((1, 4, 32, 32, 3), r"1 \+ k \* 4 frames, got 4"),
        ((1, 0, 32, 32, 3), r"1 \+ k \* 4 frames, got 0"),
        ((1, 1, 36, 32, 3), "multiples of 8, got 36x32"),
        ((1, 1, 32, 0, 3), "multiples of 8, got 32x0"),
        ((1, 3, 32, 32), r"frames uint8 \(B, T, H, W, 3\)"),
        ((1, 3, 1, 32, 32), r"frames uint8 \(B, T, H, W, 3\)"),
    ],
)
def test_shape_errors_say_the_rule(saved: dict, shape: tuple[int, ...], rule: str) -> None:
    tokenizer = CosmosTokenizer.from_pretrained(saved["CV4x8x8"][0], decoder=False)
    with pytest.raises(ValueError, match=rule):
        tokenizer.encode(torch.zeros(shape, dtype=torch.uint8))


def test_float_frames_and_wrong_latents_are_refused(saved: dict) -> None:
    tokenizer = CosmosTokenizer.from_pretrained(saved["CV4x8x8"][0])
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        tokenizer.encode(torch.zeros(1, 1, 32, 32, 3))
    with pytest.raises(ValueError, match=r"expected latents \(B, 16, t, h, w\)"):
        tokenizer.decode(torch.zeros(16, 1, 4, 4))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvidia/Cosmos-0.1-Tokenizer-CV4x8x8", "nvidia/Cosmos-0.1-Tokenizer-CV4x8x8"),
        ("Cosmos-0.1-Tokenizer-CV8x16x16", "nvidia/Cosmos-0.1-Tokenizer-CV8x16x16"),
        ("nvidia/Cosmos-Tokenizer-CV8x8x8", "nvidia/Cosmos-0.1-Tokenizer-CV8x8x8"),
        ("Cosmos-Tokenizer-CV4x8x8", "nvidia/Cosmos-0.1-Tokenizer-CV4x8x8"),
        ("CosmosCausalCV_f4x8x8", "nvidia/Cosmos-0.1-Tokenizer-CV4x8x8"),
        ("nvidia/Cosmos-1.0-Tokenizer-CV8x8x8", "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8"),
        ("nvidia/Cosmos-Tokenize1-CV8x8x8-720p", "nvidia/Cosmos-Tokenize1-CV8x8x8-720p"),
        ("someone/Cosmos-Tokenizer-CV8x8x8", "someone/Cosmos-Tokenizer-CV8x8x8"),
    ],
)
def test_older_hub_names_are_mapped(name: str, expected: str) -> None:
    assert hub_name(name) == expected


def test_a_hub_name_downloads_only_the_files_needed(
    saved: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nvidia/Cosmos-0.1-Tokenizer-CV4x8x8"
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.add(name, saved["CV4x8x8"][0])
        tokenizer = CosmosTokenizer.from_pretrained("CosmosCausalCV_f4x8x8", decoder=False)
        assert tokenizer.name == name
        assert hub.downloaded == ["encoder.jit"]
        assert CosmosTokenizer.from_pretrained(name).network.decoder is not None  # fetches what is missing
        assert hub.downloaded == ["encoder.jit", "decoder.jit"]


def test_a_cached_model_needs_no_network_and_stays_what_it_is(
    saved: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.add("a/b", saved["CV4x8x8"][0])
        CosmosTokenizer.from_pretrained("a/b")
        hub.add("a/b", saved["CV8x8x8"][0])
        hub.requests.clear()
        assert CosmosTokenizer.from_pretrained("a/b").temporal_compression == 4
        assert hub.requests == []


def test_diffusers_layout_is_downloaded_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_cosmos = bundled("tiny-cosmos")
    assert tiny_cosmos is not None
    shutil.copytree(tiny_cosmos, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "encoder.jit").write_bytes(b"without its decoder")
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.add("a/b", tmp_path / "pipeline")
        CosmosTokenizer.from_pretrained("a/b")
        assert sorted(hub.downloaded) == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


def test_a_repository_without_a_tokenizer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.repos["a/b"] = {"config.json": b"{}"}
        with pytest.raises(UserError, match=r"no tokenizer in http.*/a/b: looked for encoder.jit and decoder.jit, or"):
            CosmosTokenizer.from_pretrained("a/b")


def test_random_weights_need_a_known_variant() -> None:
    with pytest.raises(UserError, match="no such variant: CV1; there are CV8x8x8, CV4x8x8"):
        CosmosTokenizer.random_weights("CV1")


@pytest.mark.parametrize("num_frames", [1, 5])
def test_everything_is_on_the_tokenizers_device(num_frames: int) -> None:
    """Torch's meta device stands for a GPU: a weight or a constant left on the CPU can't be mixed with it."""
    tokenizer = CosmosTokenizer.random_weights("CV4x8x8", device="meta", dtype=torch.bfloat16)
    for network in (tokenizer.network, tokenizer.picture_encoder):
        assert {each.device.type for each in network.parameters()} == {"meta"}
        assert {each.dtype for each in network.parameters()} == {torch.bfloat16}
    latents = tokenizer.encode(torch.empty(2, num_frames, 64, 96, 3, dtype=torch.uint8, device="meta"))
    assert (latents.shape, latents.dtype) == ((2, 16, 1 + num_frames // 4, 8, 12), torch.bfloat16)
    assert tokenizer.decode(latents).shape == (2, num_frames, 64, 96, 3)


@pytest.mark.parametrize("num_frames", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_channels_last_it_gives_the_same_latents(dtype: torch.dtype, num_frames: int) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", dtype=dtype, decoder=False)
    frames = random_frames(tokenizer, 2)[:, :num_frames]
    plain = tokenizer.encode(frames).float()
    tokenizer.use_channels_last()
    given: list[torch.Tensor] = []
    tokenizer.network.encoder.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    found = tokenizer.encode(frames).float()
    assert (plain - found).norm() < (1e-3 if dtype == torch.float32 else 2e-2) * plain.norm()
    assert len(given) == (0 if num_frames == 1 else 1)  # pictures have an encoder of their own
    assert all(pixels.is_contiguous(memory_format=torch.channels_last_3d) for pixels in given)
    weights = [weight for weight in tokenizer.network.encoder.parameters() if weight.ndim == 5]
    assert weights
    assert all(weight.is_contiguous(memory_format=torch.channels_last_3d) for weight in weights)


@pytest.mark.skipif(not os.environ.get("COMPILE_TESTS"), reason="takes minutes; run with COMPILE_TESTS=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_gives_the_same_latents_for_every_shape(dtype: torch.dtype) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos", dtype=dtype, decoder=False)
    for shape in [(2, 1, 32, 48, 3), (1, 5, 32, 32, 3), (1, 1, 48, 48, 3)]:
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        plain, compiled = tokenizer.encode(frames).float(), tokenizer.encode_compiled(frames).float()
        assert (plain - compiled).norm() < (1e-3 if dtype == torch.float32 else 2e-2) * plain.norm()
