"""Datasets as NeMo's and DFM's scripts write them: dots before part names, a batch axis, padded text, few fields."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.patchify import patchify
from tests.datamodules import module
from tests.tiny_dataset import write_raw_dataset

PICTURE, CLIP = (4, 1, 4, 6), (4, 3, 4, 4)


def saved(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def latent(row: int) -> torch.Tensor:
    shape = CLIP if row % 2 else PICTURE
    return (torch.arange(int(np.prod(shape))) % 50 + row).reshape(shape).to(torch.bfloat16)


def padded_text(row: int) -> torch.Tensor:
    """1 + row % 3 real tokens of 8."""
    text = torch.zeros(8, 16)
    text[: 1 + row % 3] = row + 1
    return text


def nemo_metadata(row: int) -> dict:
    if row % 2:
        return {"height": 33, "width": 35, "framerate": 24.0, "num_frames": 9, "aesthetic_score": 5.5}
    return {"image_height": 33, "image_width": 50, "aesthetic_score": 5.5}


def nemo_parts(row: int, metadata: bool) -> dict[str, bytes]:
    """A picture's text is (S, D), a clip's (1, S, D), both padded numpy arrays."""
    text = padded_text(row).numpy()
    parts = {".pth": saved(latent(row)[None]), ".pickle": pickle.dumps(text[None] if row % 2 else text)}
    return {**parts, ".json": json.dumps(nemo_metadata(row)).encode()} if metadata else parts


def dfm_parts(row: int, metadata: bool) -> dict[str, bytes]:
    """Torch tensors in the pickle, in the width that the text encoder computed in."""
    parts = {"pth": saved(latent(row)), "pickle": pickle.dumps(padded_text(row).to(torch.bfloat16)[None])}
    return (
        {**parts, "json": json.dumps({"caption": "x", "num_frames": 9 if row % 2 else 1}).encode()}
        if metadata
        else parts
    )


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize("parts", [nemo_parts, dfm_parts])
def test_they_load_with_what_is_missing_derived_from_the_latent(tmp_path, parts, metadata):
    path = write_raw_dataset(tmp_path / "ds", {f"{row:06d}": parts(row, metadata) for row in range(6)})
    encoder = BasicDiffusionTaskEncoder(text_embedding_padding_size=4)
    data = module(path, seq_length=12, task_encoder=encoder)
    batches = list(data.train_dataloader())
    assert sorted(batch["__key__"][0] for batch in batches) == [f"{row:06d}" for row in range(6)]
    for batch in batches:
        row = int(batch["__key__"][0])
        expected = latent(row)
        patches = patchify(expected, 2, 1)
        assert torch.equal(batch["video"][0, : len(patches)], patches)
        assert batch["latent_shape"].tolist() == [list(expected.shape)]
        assert batch["t5_text_mask"].sum() == 1 + row % 3
        assert (batch["t5_text_embeddings"][0, : 1 + row % 3] == row + 1).all()
        knows_size = parts is nemo_parts and metadata and row % 2
        height, width = (33, 35) if knows_size else (8 * expected.shape[2], 8 * expected.shape[3])
        assert batch["image_size"].tolist() == [[height, width, height, width]]
        assert batch["fps"].item() == (24 if knows_size else 30)
        # Without metadata, 8 frames are assumed for each latent frame after the first.
        assert batch["num_frames"].item() == ((9 if metadata else 17) if row % 2 else 1)
    assert encoder.skips.by_reason() == {}


def test_without_statistics_what_needs_them_says_which_option_to_set(tmp_path):
    path = write_raw_dataset(tmp_path / "ds", {f"{row:06d}": nemo_parts(row, True) for row in range(2)})
    with pytest.raises(UserError, match=r"set data\.seq_length"):
        module(path).train_dataloader()
    with pytest.raises(UserError, match=r"set data\.virtual_epoch_length"):
        module(path, max_seq_length=24, packing_buffer_size=2).train_dataloader()
    packed = module(path, max_seq_length=24, packing_buffer_size=2, virtual_epoch_length=2)
    assert [len(batch["__key__"]) for batch in packed.train_dataloader()] == [2, 2]
    scored = BasicDiffusionTaskEncoder(filters={"aesthetic_score": {"min": 5}})
    assert len(list(module(path, seq_length=12, task_encoder=scored).train_dataloader())) == 2
