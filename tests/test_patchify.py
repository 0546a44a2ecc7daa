import pytest
import torch

from diffusion_data.patchify import _LARGE, patchify, patchify_into, position_ids_3d, sequence_length, unpatchify


def test_patch_order_is_time_rows_columns_and_within_a_patch_rows_columns_time_channels():
    latent = torch.arange(2 * 2 * 2 * 4).reshape(2, 2, 2, 4)  # value = 16 c + 8 t + 4 h + w

    patches = patchify(latent, patch_spatial=2, patch_temporal=2)

    # 2 patches (left, right) of (ph, pw, pt, C): h0 w0 t0 c0, c1, then t1, then the next column, then row 1.
    assert patches.tolist() == [
        [0, 16, 8, 24, 1, 17, 9, 25, 4, 20, 12, 28, 5, 21, 13, 29],
        [2, 18, 10, 26, 3, 19, 11, 27, 6, 22, 14, 30, 7, 23, 15, 31],
    ]


@pytest.mark.parametrize(("patch_spatial", "patch_temporal"), [(2, 1), (1, 1), (2, 3), (4, 1)])
def test_unpatchify_undoes_patchify_and_drops_padding(patch_spatial, patch_temporal):
    latent = torch.randn(3, 3, 4, 8)
    patches = patchify(latent, patch_spatial, patch_temporal)
    padded = torch.cat([patches, torch.zeros(5, patches.shape[1])])
    assert torch.equal(unpatchify(padded, latent.shape, patch_spatial, patch_temporal), latent)


@pytest.mark.parametrize(("patch_spatial", "patch_temporal"), [(2, 1), (1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_patches_written_in_place_are_the_same(patch_spatial, patch_temporal, dtype):
    whole = torch.randn(3, 6, 4, 8).to(dtype)
    for latent in (whole, whole[:, :3]):  # also of a clip that was cut
        expected = patchify(latent, patch_spatial, patch_temporal)
        padded = torch.full((2, len(expected) + 1, expected.shape[1]), 9, dtype=dtype)
        patchify_into(padded[1, : len(expected)], latent, patch_spatial, patch_temporal)
        assert torch.equal(padded[1, :-1], expected)
        assert (padded[0] == 9).all()
        assert (padded[1, -1] == 9).all()
        converted = torch.empty(expected.shape, dtype=torch.float64)
        patchify_into(converted, latent, patch_spatial, patch_temporal)
        assert torch.equal(converted, expected.double())


@pytest.mark.parametrize("patch_temporal", [1, 2])
@pytest.mark.parametrize("patch_spatial", [1, 2, 4])
def test_patches_of_large_latents_are_the_same_bit_by_bit(patch_spatial, patch_temporal):
    every_pattern = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).repeat(6)  # also NaN and -0
    whole = every_pattern[torch.randperm(len(every_pattern))].view(torch.bfloat16).view(3, 8, 128, 128)
    for latent in (whole, whole[:, 2:], whole.transpose(2, 3)):
        assert latent.numel() >= _LARGE
        expected = patchify(latent, patch_spatial, patch_temporal)
        patches = torch.empty(expected.shape, dtype=torch.bfloat16)
        patchify_into(patches, latent, patch_spatial, patch_temporal)
        assert torch.equal(patches.view(torch.int16), expected.contiguous().view(torch.int16))


def test_sequence_length_counts_patches():
    assert sequence_length((16, 5, 32, 48), patch_spatial=2, patch_temporal=1) == 5 * 16 * 24
    assert sequence_length((16, 4, 32, 48), patch_spatial=4, patch_temporal=2) == 2 * 8 * 12


def test_a_latent_that_whole_patches_do_not_cover_is_refused():
    with pytest.raises(ValueError, match=r"1x3x4.*1x2x2"):
        sequence_length((16, 1, 3, 4), patch_spatial=2, patch_temporal=1)


def test_position_ids_follow_the_patch_order():
    assert position_ids_3d(2, 1, 2).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert position_ids_3d(2, 1, 2).dtype == torch.int64


def test_position_ids_name_the_patch_at_their_row():
    latent = torch.zeros(1, 2, 4, 6)
    latent[0, 1, 2, 4] = 1  # t = 1, row of patches 1, column of patches 2
    row = patchify(latent, 2, 1).sum(dim=1).argmax()
    assert position_ids_3d(2, 2, 3)[row].tolist() == [1, 1, 2]
