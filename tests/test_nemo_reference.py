"""NeMo's own Cosmos network and ours give the same latents from one encoder.jit (extra: nemo).

NeMo's own task encoder reads our datasets, in an environment of its own: it needs energon 5, ours energon 7.

    NEMO_PYTHON=/path/to/nemo/bin/python pytest tests/test_nemo_reference.py
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_data.cosmos_tokenizer import CosmosTokenizer, scale_pixels
from diffusion_data.energon_metadata import write_energon_metadata
from diffusion_data.patchify import patchify
from diffusion_data.testing import tiny_samples, write_dataset
from tests.original_cosmos_network import save_traced

pytestmark = pytest.mark.filterwarnings("ignore")  # NeMo's dependencies warn at import


@pytest.fixture(scope="module")
def networks() -> Any:
    try:
        return importlib.import_module("nemo.collections.common.video_tokenizers.networks")
    except (ImportError, TypeError) as error:  # TypeError: beside Lightning 2.6, which it predates
        pytest.skip(f"NeMo 2.7 can't be imported ({error}): pip install -e '.[test,nemo]'")


def nemo_network(networks: Any, **changes: Any) -> torch.nn.Module:
    """With random weights; NeMo's published configuration (CV8x8x8) but for the changes."""
    config = {**copy.deepcopy(networks.TokenizerConfigs.CV.value), **changes}
    torch.manual_seed(0)
    return networks.TokenizerModels[config["name"]].value(**config).eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "CV8x8x8": {},
    "CV4x8x8": {"channels_mult": [2, 4], "temporal_compression": 4},
    "CV8x16x16": {"spatial_compression": 16},
    "CV4x8x8-360p": {"patch_size": 2, "temporal_compression": 4},
}
TINY = {"channels": 8, "num_res_blocks": 1}


def compare(network: torch.nn.Module, folder: Path, frames: torch.Tensor) -> None:
    pixels = scale_pixels(frames, torch.float32)
    save_traced(network.encoder_jit(), network.decoder_jit(), pixels, folder)
    tokenizer = CosmosTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = network.encoder_jit()(pixels)[0]
        expected_pixels = network.decode(expected)
        latents = tokenizer.network.encode(pixels).latent_dist.mode()
        ours = tokenizer.network.decode(expected).sample
    assert expected.std() > 0.05
    assert (latents - expected).abs().max() <= 1e-5
    assert (ours - expected_pixels).abs().max() <= 1e-5 * expected_pixels.abs().max()
    if frames.shape[1] == 1:  # the way that pictures go
        with torch.no_grad():
            latents = tokenizer.picture_encoder(pixels[:, :, 0])[:, :, None]
        assert (latents - expected).abs().max() <= 1e-5
    assert torch.equal(tokenizer.encode(frames), latents.to(torch.bfloat16))


def random_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("num_frames", [1, 17])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_tiny_channels(networks: Any, tmp_path: Path, variant: str, num_frames: int) -> None:
    network = nemo_network(networks, **VARIANTS[variant], **TINY)
    compare(network, tmp_path, random_frames(num_frames, 32, 48))


def test_published_size(networks: Any, tmp_path: Path) -> None:
    compare(nemo_network(networks, **VARIANTS["CV4x8x8"]), tmp_path, random_frames(5, 64, 64))


READ_TWO_PASSES = """
import itertools, json, sys
from megatron.energon import WorkerConfig, get_loader, get_train_dataset

dataset = get_train_dataset(
    sys.argv[1],
    worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    batch_size=1,
    shuffle_buffer_size=None,
    max_samples_per_sequence=None,
    task_encoder=TaskEncoder(text_embedding_padding_size=8, **json.loads(sys.argv[2])),
    packing_buffer_size=json.loads(sys.argv[3]),
)
for batch in itertools.islice(get_loader(dataset), int(sys.argv[4])):
    used = batch["loss_mask"].bool()
    print(json.dumps({
        "latent_shape": batch["latent_shape"].tolist(),
        "seq_len_q": batch["seq_len_q"].tolist(),
        "video": batch["video"][used].float().sum().item(),
        "text": batch["t5_text_embeddings"].float().sum().item(),
    }), file=sys.stderr)
"""


def read_with_nemo(dataset: Path, options: dict[str, int], packing_buffer_size: int | None, batches: int) -> list[Any]:
    """What NeMo's class, bridged as the documentation shows, gives of a dataset."""
    document = (Path(__file__).parents[1] / "docs" / "training_data.rst").read_text()
    bridge = re.search(
        r"( {4}from megatron\.energon import Cooker.*?cookers = \[Cooker\(cook\)\]\n)", document, re.DOTALL
    )
    assert bridge is not None
    arguments = [str(dataset), json.dumps(options), json.dumps(packing_buffer_size), str(batches)]
    command = [os.environ["NEMO_PYTHON"], "-W", "ignore", "-c", textwrap.dedent(bridge[1]) + READ_TWO_PASSES]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


@pytest.mark.skipif("NEMO_PYTHON" not in os.environ, reason="NEMO_PYTHON names no Python with NeMo 2.7 and energon 5")
def test_nemos_own_task_encoder_reads_a_dataset_made_here(tmp_path: Path) -> None:
    samples = tiny_samples(6, [(4, 1, 4, 6), (4, 3, 4, 4)])
    dataset = write_dataset(tmp_path / "dataset", samples)
    write_energon_metadata(dataset, sorted(path.name for path in dataset.glob("*.tar")), [1, 0, 0], seed=0)
    padded = read_with_nemo(dataset, {"seq_length": 12}, None, batches=6)
    packed = read_with_nemo(dataset, {"max_seq_length": 24}, 6, batches=3)

    patches = [patchify(sample.latent, 2, 1).float() for sample in samples]
    expected = [
        {
            "latent_shape": [list(sample.latent.shape)],
            "seq_len_q": [len(video)],
            "video": video.sum().item(),
            "text": float(sample.text_embedding.sum()),
        }
        for sample, video in zip(samples, patches, strict=True)
    ]
    assert sorted(padded, key=str) == sorted(expected, key=str)
    assert sorted(length for pack in packed for length in pack["seq_len_q"]) == sorted(map(len, patches))
    assert sum(pack["video"] for pack in packed) == sum(video.sum().item() for video in patches)
