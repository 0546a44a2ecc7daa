"""The disk contract: exact bytes out, every known layout in."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
import torch

from diffusion_data.latent_sample import (
    RESERVED_FIELDS,
    LatentSample,
    all_finite,
    build_metadata,
    largest_magnitude,
    parse_key,
    sample_key,
)


def metadata(**extra: object) -> dict[str, object]:
    return build_metadata(
        caption="a red circle",
        image_height=100,
        image_width=150,
        height=64,
        width=96,
        num_frames=9,
        framerate=24.0,
        num_text_tokens=3,
        source_file="a.parquet",
        source_row=7,
        extra=extra,
    )


def sample() -> LatentSample:
    latent = torch.arange(16 * 3 * 8 * 12).reshape(16, 3, 8, 12).to(torch.bfloat16)
    text = np.arange(12, dtype=np.float16).reshape(3, 4) + 1
    return LatentSample(key=sample_key(7), latent=latent, text_embedding=text, metadata=metadata(score=5.5))


def decoded(parts: dict[str, bytes]) -> dict[str, object]:
    return {
        "pth": torch.load(io.BytesIO(parts["pth"]), weights_only=True),
        "pickle": pickle.loads(parts["pickle"]),
        "json": json.loads(parts["json"]),
    }


def test_parts_hold_exactly_the_sample() -> None:
    original = sample()
    parts = original.to_parts()
    assert sorted(parts) == ["json", "pickle", "pth"]
    back = LatentSample.from_parts(original.key, decoded(parts))
    assert torch.equal(back.latent, original.latent)
    assert back.latent.dtype == torch.bfloat16
    np.testing.assert_array_equal(back.text_embedding, original.text_embedding)
    assert back.metadata == original.metadata


def test_metadata_has_the_documented_fields_and_the_kept_columns() -> None:
    assert metadata(score=5.5) == {
        "caption": "a red circle",
        "image_height": 100,
        "image_width": 150,
        "height": 64,
        "width": 96,
        "aspect_ratio": 1.5,
        "resolution": "96x64",
        "num_frames": 9,
        "framerate": 24.0,
        "num_text_tokens": 3,
        "source_file": "a.parquet",
        "source_row": 7,
        "score": 5.5,
    }
    of_clips = {"start_seconds", "end_seconds", "mirrored"}  # there only where they mean something
    assert set(metadata()) | of_clips == RESERVED_FIELDS


def test_equal_samples_give_equal_bytes_also_when_cut_from_a_batch() -> None:
    original = sample()
    batch = torch.stack([original.latent, torch.zeros_like(original.latent)])
    view = LatentSample(
        key=original.key,
        latent=batch[0],
        text_embedding=original.text_embedding,
        metadata=original.metadata,
    )
    assert view.to_parts() == original.to_parts()


def test_keys_are_the_row_number_and_one_part_before_the_first_dot() -> None:
    assert sample_key(42) == "samples/sample_000000042"
    assert [sample_key(42, number, 2) for number in range(2)] == [
        "samples/sample_000000042_000",
        "samples/sample_000000042_001",
    ]


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (sample_key(42), (42, None)),
        (sample_key(10**9 + 7), (10**9 + 7, None)),
        (sample_key(42, 0, 3), (42, 0)),
        (sample_key(42, 1234, 2000), (42, 1234)),
        ("samples/sample_0000000042", None),
        ("samples/sample_000000042_01", None),
        ("samples/sample_000000042_0001", None),
        ("samples/sample_42", None),
        ("000042", None),
    ],
)
def test_a_key_leads_back_to_its_row_and_no_other_text_does(key: str, place: tuple[int, int | None] | None) -> None:
    assert parse_key(key) == place


def test_a_sample_as_nemo_writes_it_loads() -> None:
    padded = torch.zeros(1, 512, 4, dtype=torch.bfloat16)
    padded[0, :3] = torch.ones(3, 4)
    parts = {".pth": torch.ones(1, 16, 1, 8, 12), ".pickle": padded}
    back = LatentSample.from_parts("000007", parts)
    assert back.latent.shape == (16, 1, 8, 12)
    assert back.latent.dtype == torch.bfloat16
    assert back.text_embedding.shape == (3, 4)
    assert back.metadata == {
        "image_height": 64,
        "image_width": 96,
        "height": 64,
        "width": 96,
        "num_frames": 1,
        "num_text_tokens": 3,
    }


def test_metadata_that_is_null_is_derived_like_what_is_missing() -> None:
    parts = {
        "pth": torch.ones(16, 1, 8, 12),
        "pickle": np.ones((3, 4), np.float16),
        "json": {"height": None, "fps": None},
    }
    metadata = LatentSample.from_parts("x", parts).metadata
    assert (metadata["height"], metadata["width"], metadata["fps"]) == (64, 96, None)


def test_a_missing_part_and_a_wrong_shape_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"samples/x: no part 'pickle', only \['json', 'pth'\]"):
        LatentSample.from_parts("samples/x", {"pth": torch.zeros(16, 1, 2, 2), "json": {}})
    with pytest.raises(ValueError, match=r"samples/x: expected a bfloat16 latent \(C, T, H, W\)"):
        LatentSample.from_parts("samples/x", {"pth": torch.zeros(16, 2, 2), "pickle": np.ones((2, 4))})
    with pytest.raises(ValueError, match=r"samples/x: expected a text embedding \(S, D\)"):
        LatentSample.from_parts("samples/x", {"pth": torch.zeros(16, 1, 2, 2), "pickle": np.ones(4)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_anywhere_is_found(bad: float) -> None:
    values = torch.zeros(4, 5, dtype=torch.bfloat16)
    assert all_finite(values)
    assert all_finite(np.zeros((0, 3), np.float16))
    values[2, 3] = bad
    assert not all_finite(values)
    assert not all_finite(values.float().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_magnitude_is_exact_for_every_value_of_16_bits(dtype: torch.dtype) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for value in patterns[:: 2**6]:
        expected = abs(value.item())
        for others in ([], [0.0, -0.0], [0.0]):
            found = largest_magnitude(torch.cat([value[None], torch.tensor(others, dtype=dtype)]))
            assert found == expected or (found != found and expected != expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_magnitude_is_that_of_either_sign(dtype: torch.dtype) -> None:
    for values in ([1.5, -2.5], [2.5, -1.5], [-1.0, -2.5], [1.0, 2.5], [-0.0, 2.5]):
        assert largest_magnitude(torch.tensor(values, dtype=dtype)) == 2.5
        assert largest_magnitude(torch.tensor([values, values], dtype=dtype)[:, :2].t()) == 2.5
    assert largest_magnitude(torch.zeros(0, dtype=dtype)) == 0
    assert largest_magnitude(np.array([-3, 2], np.float16)) == 3
    assert largest_magnitude(np.array([-3, 2], np.float64)) == 3
