import json
import pickle

import numpy as np
import pytest
import torch
from megatron.energon import SkipSample, stateless

from diffusion_data.diffusion_sample import DiffusionSample
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder, cook
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LatentSample
from tests.test_safe_decoder import Hostile, saved
from tests.tiny_dataset import tiny_sample


def encode(encoder: BasicDiffusionTaskEncoder, sample: LatentSample):
    return encode_parts(encoder, sample.key, sample.to_parts())


def encode_parts(encoder: BasicDiffusionTaskEncoder, key: str, parts: dict[str, bytes]):
    decoded = encoder.decoder({"__key__": key, "__restore_key__": (), **parts})
    return encoder.encode_sample(cook(decoded))


def batch_of(encoder: BasicDiffusionTaskEncoder, *samples: LatentSample):
    return encoder.encode_batch(encoder.batch([encode(encoder, sample) for sample in samples]))


def skip_reason(encoder: BasicDiffusionTaskEncoder, sample: LatentSample) -> str:
    before = encoder.skips.by_reason()
    with pytest.raises(SkipSample):
        encode(encoder, sample)
    after = encoder.skips.by_reason()
    (reason,) = [name for name in after if after[name] != before.get(name, 0)]
    return reason


def test_a_picture_and_a_clip_make_one_batch_with_exact_values():
    encoder = BasicDiffusionTaskEncoder(text_embedding_padding_size=4, seq_length=8)
    picture = tiny_sample(0, (1, 1, 2, 4), tokens=3)
    clip = tiny_sample(1, (1, 3, 4, 2), tokens=6, framerate=12.0)

    batch = batch_of(encoder, picture, clip)

    assert batch["video"].dtype == torch.bfloat16
    assert batch["video"].shape == (2, 8, 4)
    assert batch["video"][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]] + [[0] * 4] * 6
    assert batch["video"][1].tolist() == [[1 + i for i in range(4 * p, 4 * p + 4)] for p in range(6)] + [[0] * 4] * 2
    assert batch["loss_mask"].tolist() == [[1] * 2 + [0] * 6, [1] * 6 + [0] * 2]
    assert batch["pos_ids"][0].tolist() == [[0, 0, 0], [0, 0, 1]] + [[0] * 3] * 6
    assert batch["pos_ids"][1].tolist() == [[t, h, 0] for t in range(3) for h in range(2)] + [[0] * 3] * 2
    assert batch["t5_text_embeddings"][:, :, 0].tolist() == [[1, 1, 1, 0], [2, 2, 2, 2]]
    assert batch["t5_text_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["seq_len_q"].tolist() == [2, 6]
    assert batch["seq_len_kv"].tolist() == [3, 4]
    assert batch["latent_shape"].tolist() == [[1, 1, 2, 4], [1, 3, 4, 2]]
    assert batch["image_size"].tolist() == [[16, 32, 16, 32], [32, 16, 32, 16]]
    assert batch["fps"].tolist() == [30, 12]
    assert batch["num_frames"].tolist() == [1, 9]
    assert batch["__key__"] == [picture.key, clip.key]


def test_dtypes_are_those_of_the_contract():
    batch = batch_of(BasicDiffusionTaskEncoder(seq_length=8), tiny_sample(0))
    expected = dict.fromkeys(["video", "t5_text_embeddings", "t5_text_mask", "loss_mask"], torch.bfloat16)
    expected |= dict.fromkeys(["image_size", "fps", "num_frames"], torch.float32)
    expected |= dict.fromkeys(["seq_len_q", "seq_len_kv", "latent_shape"], torch.int32) | {"pos_ids": torch.int64}
    assert type(batch) is dict
    assert {name: value.dtype for name, value in batch.items() if name != "__key__"} == expected
    assert batch["t5_text_mask"].shape == (1, 512)


def test_max_frames_cuts_first_and_everything_follows():
    encoder = BasicDiffusionTaskEncoder(max_frames=2, seq_length=8)
    clip = tiny_sample(0, (2, 5, 4, 4), framerate=10.0)  # whole: 20 patches, more than seq_length

    batch = batch_of(encoder, clip)

    assert batch["latent_shape"].tolist() == [[2, 2, 4, 4]]
    assert batch["seq_len_q"].tolist() == [8]
    assert batch["loss_mask"].sum() == 8
    assert batch["num_frames"].tolist() == [5]  # 4 pixel frames each latent frame after the first
    assert batch["pos_ids"][0, :, 0].tolist() == [0] * 4 + [1] * 4
    assert batch["video"][0, 4].tolist() == clip.latent[:, 1, :2, :2].permute(1, 2, 0).flatten().tolist()


def test_a_clip_cut_to_one_frame_stands_for_one_frame():
    batch = batch_of(BasicDiffusionTaskEncoder(max_frames=1), tiny_sample(0, (2, 5, 4, 4), framerate=10.0))
    assert batch["num_frames"].tolist() == [1]
    assert batch["fps"].tolist() == [10]


def test_without_seq_length_a_batch_is_as_long_as_its_longest():
    batch = batch_of(BasicDiffusionTaskEncoder(), tiny_sample(0, (2, 1, 4, 4)), tiny_sample(1, (2, 1, 4, 8)))
    assert batch["video"].shape == (2, 8, 8)
    assert batch["loss_mask"].sum(dim=1).tolist() == [4, 8]


def test_temporal_patches():
    batch = batch_of(BasicDiffusionTaskEncoder(patch_spatial=1, patch_temporal=2), tiny_sample(0, (3, 4, 2, 2)))
    assert batch["video"].shape == (1, 8, 6)
    assert batch["pos_ids"][0, :, 0].tolist() == [0] * 4 + [1] * 4


def test_what_can_not_be_trained_on_is_skipped_and_counted_by_reason():
    encoder = BasicDiffusionTaskEncoder(seq_length=4, aesthetic_score=5.0)

    def changed(**values):
        sample = tiny_sample(0)
        return LatentSample(**{**vars(sample), **values})

    nan = torch.full((4, 1, 4, 4), float("nan"), dtype=torch.bfloat16)
    large = torch.full((4, 1, 4, 4), -1008.0, dtype=torch.bfloat16)
    no_text = np.zeros((2, 8), dtype=np.float16)
    assert skip_reason(encoder, changed(latent=nan)) == "not_finite"
    assert skip_reason(encoder, changed(latent=nan * float("inf"))) == "not_finite"
    assert skip_reason(encoder, changed(text_embedding=no_text * np.float16("nan") + np.float16("inf"))) == "not_finite"
    assert skip_reason(encoder, changed(latent=large)) == "too_large_values"
    assert skip_reason(encoder, changed(text_embedding=no_text)) == "no_text"
    assert skip_reason(encoder, tiny_sample(0, (4, 1, 4, 6))) == "too_long"
    assert skip_reason(encoder, tiny_sample(0, (4, 1, 3, 4))) == "not_divisible"
    assert skip_reason(encoder, tiny_sample(0, aesthetic_score=4.9)) == "low_aesthetic_score"
    assert skip_reason(encoder, tiny_sample(0, aesthetic_score="good")) == "unreadable"
    assert skip_reason(encoder, changed(metadata={"height": "tall"})) == "unreadable"
    assert encoder.skips.by_reason()["not_finite"] == 3
    assert encoder.skips.used == 0


@pytest.mark.parametrize("score", [{}, {"aesthetic_score": None}, {"aesthetic_score": 5.0}, {"aesthetic_score": 7}])
def test_the_aesthetic_score_counts_only_where_it_is_known(score):
    encode(BasicDiffusionTaskEncoder(aesthetic_score=5.0), tiny_sample(0, **score))


def test_skips_are_logged_with_the_key_and_not_without_end(caplog):
    encoder = BasicDiffusionTaskEncoder(seq_length=1)
    for row in range(10):
        skip_reason(encoder, tiny_sample(row))
    assert len(caplog.records) == 3
    assert "samples/sample_000000000: too_long: 4 patches, seq_length=1" in caplog.messages[0]
    assert encoder.skips.by_reason() == {"too_long": 10}


def test_a_sample_in_the_way_of_nemos_scripts_is_read():
    """Leading dots, a batch axis, a padded torch tensor in the pickle, metadata with NeMo's fields or none."""
    latent = torch.arange(32).reshape(1, 2, 1, 4, 4).to(torch.bfloat16)
    text = torch.zeros(1, 6, 8)
    text[0, :2] = 3
    parts = {".pth": saved(latent), ".pickle": pickle.dumps(text)}
    encoder = BasicDiffusionTaskEncoder(text_embedding_padding_size=4, seq_length=4)
    metadata = {"image_height": 30, "image_width": 31}
    for written in [parts, {**parts, ".json": json.dumps(metadata).encode()}]:
        batch = encoder.batch([encode_parts(encoder, "000001", written)])
        assert batch["latent_shape"].tolist() == [[2, 1, 4, 4]]
        assert batch["t5_text_mask"].tolist() == [[1, 1, 0, 0]]
        assert batch["t5_text_embeddings"][0, :, 0].tolist() == [3, 3, 0, 0]
        assert batch["image_size"].tolist() == [[32, 32, 32, 32]]
        assert batch["fps"].tolist() == [30]
        assert batch["num_frames"].tolist() == [1]


def test_a_video_without_metadata_counts_eight_frames_each_latent_frame():
    sample = tiny_sample(0, (2, 3, 4, 4))
    parts = {name: part for name, part in sample.to_parts().items() if name != "json"}
    encoder = BasicDiffusionTaskEncoder()
    assert encode_parts(encoder, "a", parts).num_frames == 17


def test_a_hostile_part_is_skipped_with_its_key_and_runs_nothing(tmp_path, caplog):
    marker = tmp_path / "ran"
    encoder = BasicDiffusionTaskEncoder()
    parts = {**tiny_sample(0).to_parts(), "pickle": pickle.dumps(Hostile(str(marker)))}
    with pytest.raises(SkipSample):
        encode_parts(encoder, "samples/evil", parts)
    assert "samples/evil" in caplog.text
    assert "posix.mkdir" in caplog.text
    assert encoder.skips.by_reason() == {"unreadable": 1}
    assert not marker.exists()


def test_samples_of_different_models_can_not_be_batched():
    with pytest.raises(UserError, match="t5_text_embeddings of samples/sample_000000001 is 16 wide"):
        batch_of(BasicDiffusionTaskEncoder(), tiny_sample(0), tiny_sample(1, text_dim=16))


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="patch_spatial must be at least 1"):
        BasicDiffusionTaskEncoder(patch_spatial=0)


def test_text_is_rounded_to_bfloat16_as_torch_rounds_it():
    every_finite_half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every_finite_half = every_finite_half[every_finite_half.isfinite()]
    text = every_finite_half[: len(every_finite_half) // 200 * 200].view(200, -1)  # more rows than go at a time
    sample = LatentSample(**{**vars(tiny_sample(0)), "text_embedding": text.numpy()})
    encoder = BasicDiffusionTaskEncoder(text_embedding_padding_size=250)
    batch = batch_of(encoder, sample)
    assert torch.equal(batch["t5_text_embeddings"][0, :200], text.to(torch.bfloat16))
    assert not batch["t5_text_embeddings"][0, 200:].any()
    assert torch.equal(encode(encoder, sample).t5_text_embeddings, text.to(torch.bfloat16))


def test_an_encoded_sample_shows_what_the_batch_will_hold():
    encoder = BasicDiffusionTaskEncoder(seq_length=8)
    sample = encode(encoder, tiny_sample(3, (2, 2, 4, 4)))
    batch = encoder.batch([sample])
    assert sample.latent_shape == (2, 2, 4, 4)
    assert torch.equal(batch["video"][0], sample.video)
    assert torch.equal(batch["pos_ids"][0], sample.pos_ids)
    assert torch.equal(batch["loss_mask"][0], sample.loss_mask)
    assert torch.equal(batch["t5_text_mask"][0, :3], sample.t5_text_mask)
    assert (sample.seq_len_q, sample.seq_len_kv) == (8, 3)


def test_an_encode_sample_of_the_users_changes_what_ours_returns():
    class Negative(BasicDiffusionTaskEncoder):
        @stateless
        def encode_sample(self, sample):
            encoded = super().encode_sample(sample)
            return DiffusionSample.extend(encoded, latent=-encoded.latent)

    sample = tiny_sample(3)
    ours = batch_of(BasicDiffusionTaskEncoder(), sample)
    theirs = batch_of(Negative(), sample)
    assert torch.equal(theirs["video"], -ours["video"])
    assert ours["video"].any()
