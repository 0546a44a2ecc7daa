from collections import Counter

import numpy as np
import pytest
import torch

from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.patchify import patchify
from tests.datamodules import flat, module, rows, through_a_checkpoint
from tests.test_diffusion_taskencoder import encode
from tests.tiny_dataset import tiny_sample, write_dataset

# Pictures of 1 to 8 patches and clips of 6 and 12, of 2x2x1 each.
SHAPES = [(4, 1, 2, 2), (4, 1, 4, 4), (4, 1, 2, 6), (4, 3, 2, 4), (4, 1, 4, 8), (4, 3, 4, 4), (4, 1, 4, 6)]
MIXED = [
    tiny_sample(row, SHAPES[row * 5 % 7], tokens=1 + row % 5, framerate=12.0 if SHAPES[row * 5 % 7][1] > 1 else None)
    for row in range(40)
]
PACKED = {"max_seq_length": 24, "packing_buffer_size": 10, "micro_batch_size": 2, "global_batch_size": 2}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("mixed") / "ds", MIXED, per_shard=10, split={"train": 0.75, "val": 0.25, "test": 0}
    )


def test_a_packed_batch_has_exact_values():
    encoder = BasicDiffusionTaskEncoder(max_seq_length=8, text_embedding_padding_size=4)
    shapes = [(1, 1, 2, 4), (1, 3, 2, 4), (1, 1, 2, 2)]
    stored = [tiny_sample(row, shapes[row], tokens=(3, 6, 1)[row]) for row in range(3)]
    a, b, c = (encode(encoder, sample) for sample in stored)

    batch = encoder.batch([encoder.pack_selected_samples([a, b]), encoder.pack_selected_samples([c])])

    assert batch["video"].shape == (2, 8, 4)
    assert torch.equal(batch["video"][0], torch.cat([patchify(sample.latent, 2, 1) for sample in stored[:2]]))
    assert torch.equal(batch["video"][1, :1], patchify(stored[2].latent, 2, 1))
    assert not batch["video"][1, 1:].any()
    assert batch["loss_mask"].tolist() == [[1] * 8, [1] + [0] * 7]
    assert batch["pos_ids"][0].tolist() == [[0, 0, w] for w in (0, 1)] + [[t, 0, w] for t in range(3) for w in (0, 1)]
    assert not batch["pos_ids"][1].any()
    assert batch["t5_text_embeddings"][:, :, 0].tolist() == [[1, 1, 1, 2, 2, 2, 2], [3, 0, 0, 0, 0, 0, 0]]
    assert batch["t5_text_mask"].tolist() == [[1] * 7, [1] + [0] * 6]
    assert batch["seq_len_q"].tolist() == [2, 6, 1]
    assert batch["seq_len_kv"].tolist() == [3, 4, 1]  # the second text is cut to 4
    assert batch["cu_seqlens_q"].tolist() == [0, 2, 8, 9]
    assert batch["cu_seqlens_kv"].tolist() == [0, 3, 7, 8]
    assert batch["cu_seqlens_q_padded"].tolist() == [0, 2, 8, 16]
    assert batch["cu_seqlens_kv_padded"].tolist() == [0, 3, 7, 14]
    assert batch["latent_shape"].tolist() == [[1, 1, 2, 4], [1, 3, 2, 4], [1, 1, 2, 2]]
    assert batch["image_size"].tolist() == [[16, 32, 16, 32], [16, 32, 16, 32], [16, 16, 16, 16]]
    assert batch["num_frames"].tolist() == [1, 9, 1]
    assert batch["fps"].tolist() == [30, 30, 30]
    assert batch["__key__"] == [sample.key for sample in stored]
    dtypes = {name: value.dtype for name, value in batch.items() if name != "__key__"}
    lengths = [
        "seq_len_q",
        "seq_len_kv",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "cu_seqlens_q_padded",
        "cu_seqlens_kv_padded",
    ]
    assert dtypes == {
        **dict.fromkeys(["video", "t5_text_embeddings", "t5_text_mask", "loss_mask"], torch.bfloat16),
        **dict.fromkeys(["image_size", "fps", "num_frames"], torch.float32),
        **dict.fromkeys([*lengths, "latent_shape"], torch.int32),
        "pos_ids": torch.int64,
    }


def test_for_context_parallel_ranks_each_sample_begins_at_a_multiple():
    encoder = BasicDiffusionTaskEncoder(max_seq_length=10, length_multiple=4)
    a, b = (encode(encoder, tiny_sample(row, (1, 1, 2, 4 + 2 * row))) for row in range(2))  # 2 and 3 patches
    assert encoder.select_samples_to_pack([a, b]) == [[a, b]]
    batch = encoder.batch([encoder.pack_selected_samples([a, b])])
    assert batch["video"].shape[1] == 12
    assert batch["loss_mask"].tolist() == [[1, 1, 0, 0, 1, 1, 1] + [0] * 5]
    assert batch["cu_seqlens_q"].tolist() == [0, 2, 5]
    assert batch["cu_seqlens_q_padded"].tolist() == [0, 4, 12]
    assert batch["t5_text_mask"].tolist() == [[1] * 6 + [0] * 2]


def test_the_lengths_tell_where_each_sample_lies(mixed):
    by_row = dict(enumerate(MIXED))
    for batch, _ in zip(module(mixed, **PACKED).train_dataloader(), range(6), strict=False):
        flattened, texts = batch["video"].flatten(0, 1), batch["t5_text_embeddings"].flatten(0, 1)
        mask = torch.zeros(batch["loss_mask"].numel())
        for number, key in enumerate(batch["__key__"]):
            sample = by_row[int(key[-9:])]
            length, text_length = batch["seq_len_q"][number], batch["seq_len_kv"][number]
            start, text_start = batch["cu_seqlens_q_padded"][number], batch["cu_seqlens_kv_padded"][number]
            assert torch.equal(flattened[start : start + length], patchify(sample.latent, 2, 1))
            assert (texts[text_start : text_start + text_length] == sample.latent[0, 0, 0, 0] + 1).all()
            assert batch["latent_shape"][number].tolist() == list(sample.latent.shape)
            mask[start : start + length] = 1
        assert torch.equal(mask.view(2, -1), batch["loss_mask"].float())
        assert torch.equal(batch["cu_seqlens_q"].diff(), batch["seq_len_q"])
        assert batch["cu_seqlens_q_padded"][-1] == 2 * 24


def test_every_sample_comes_once_in_a_pass_over_packed_batches(mixed):
    validated = rows(module(mixed, **PACKED, num_workers=0).val_dataloader())
    assert sorted(flat(validated)) == list(range(30, 40))
    data = module(mixed, **{**PACKED, "virtual_epoch_length": 60})
    counts = Counter(flat(rows(data.train_dataloader())))
    assert len(counts) == 30
    assert max(counts.values()) - min(counts.values()) <= 2  # the last pass isn't over, and a few wait in the buffer


def test_a_sample_waits_for_a_fuller_sequence_once_at_most(tmp_path):
    """One clip leaves more room than any other sequence would, whenever it comes."""
    shapes = [(1, 1, 4, 8)] * 9 + [(1, 1, 6, 6)]  # 8 patches, which fill sequences of 16 by twos, and 9
    path = write_dataset(tmp_path / "ds", [tiny_sample(row, shape) for row, shape in enumerate(shapes)])
    data = module(path, max_seq_length=16, packing_buffer_size=5, virtual_epoch_length=60)
    counts = Counter(flat(rows(data.train_dataloader())))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_an_epoch_of_packed_batches_is_about_a_pass(mixed):
    loader = module(mixed, **PACKED).train_dataloader()
    seen = flat(rows(loader))
    assert 24 <= len(seen) <= 36
    assert len(rows(loader)) == len(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_packed_batches_resume_at_the_next_one(mixed, num_workers):
    options = {**PACKED, "num_workers": num_workers, "virtual_epoch_length": 8}
    reference = module(mixed, **options)
    stream, states = [], []
    for _ in range(2):
        for batch in reference.train_dataloader():
            stream.append(batch)
            states.append(through_a_checkpoint(reference.state_dict()))
    for done in (1, 4, 6, 8) if num_workers == 0 else (5,):
        resumed = module(mixed, **options)
        resumed.load_state_dict(states[done - 1])
        rest = [batch for _ in range(2) for batch in resumed.train_dataloader()][: 16 - done]
        assert [batch["__key__"] for batch in rest] == [batch["__key__"] for batch in stream[done:]]
        for ours, theirs in zip(rest, stream[done:], strict=True):
            assert torch.equal(ours["video"], theirs["video"])


def test_packed_validation_is_the_same_each_time(mixed):
    data = module(mixed, **PACKED)
    loader = data.val_dataloader()
    next(iter(loader))
    assert rows(loader) == rows(loader) == rows(loader)
    with pytest.raises(TypeError, match="how many packed or bucketed batches"):
        len(loader)


def test_packed_training_is_silent(mixed, capfd):
    next(iter(module(mixed, **PACKED).train_dataloader()))
    assert capfd.readouterr() == ("", "")


def test_at_least_95_percent_of_positions_are_used_on_a_mixed_set(tmp_path):
    """Pictures of several aspects and clips, as a set of 256-pixel material has them."""
    rng = np.random.default_rng(0)
    pictures = [(1, 1, 32, 32), (1, 1, 24, 40), (1, 1, 40, 24), (1, 1, 28, 36), (1, 1, 20, 20)]
    shapes = [*pictures, (1, 5, 32, 32), (1, 3, 24, 40)]
    samples = [tiny_sample(row, shapes[rng.integers(len(shapes))]) for row in range(400)]
    data = module(
        write_dataset(tmp_path / "ds", samples, per_shard=100),
        max_seq_length=4096,
        packing_buffer_size=128,
        virtual_epoch_length=30,
    )
    shares = [batch["loss_mask"].mean().item() for batch in data.train_dataloader()]
    assert np.mean(shares) >= 0.97
    assert data.task_encoder.positions.used_share == pytest.approx(np.mean(shares), abs=1e-3)


def test_padding_is_counted_across_workers(mixed):
    data = module(mixed, **PACKED, num_workers=2)
    batches = list(data.val_dataloader())
    positions = data.task_encoder.positions
    assert positions.used == sum(int(batch["seq_len_q"].sum()) for batch in batches)
    assert positions.used + positions.padding == sum(batch["loss_mask"].numel() for batch in batches)


def test_samples_longer_than_a_sequence_are_skipped_and_counted(mixed):
    data = module(mixed, max_seq_length=8, packing_buffer_size=4, virtual_epoch_length=8)
    assert all(MIXED[row].latent[0].numel() // 4 <= 8 for row in flat(rows(data.train_dataloader())))
    assert set(data.task_encoder.skips.by_reason()) == {"too_long"}


def test_packing_options_that_do_not_fit_are_refused(mixed):
    with pytest.raises(UserError, match="packing_buffer_size is not set"):
        module(mixed, max_seq_length=8)
    with pytest.raises(UserError, match="max_seq_length is not set"):
        module(mixed, packing_buffer_size=8)
    with pytest.raises(UserError, match="bucket_by_shape"):
        module(mixed, max_seq_length=8, packing_buffer_size=8, bucket_by_shape=True)


def test_the_task_encoder_may_bring_the_length_of_packed_sequences(mixed):
    data = module(mixed, packing_buffer_size=4, task_encoder=BasicDiffusionTaskEncoder(max_seq_length=16))
    assert next(iter(data.train_dataloader()))["video"].shape[1] == 16
    with pytest.raises(UserError, match="max_seq_length=24, but the task encoder was made with 16"):
        module(mixed, **PACKED, task_encoder=BasicDiffusionTaskEncoder(max_seq_length=16))
    with pytest.raises(UserError, match="packing_buffer_size is not set"):
        module(mixed, task_encoder=BasicDiffusionTaskEncoder(max_seq_length=16))


def test_lengths_are_rounded_up_to_a_multiple_on_request(mixed):
    encoder = BasicDiffusionTaskEncoder(length_multiple=16)
    batch = next(iter(module(mixed, task_encoder=encoder).train_dataloader()))
    assert batch["video"].shape[1] == 16  # the longest has 12 patches
    assert batch["t5_text_embeddings"].shape[1] == 512


def test_a_state_of_another_layout_is_refused(mixed):
    reference = module(mixed, **PACKED)
    next(iter(reference.train_dataloader()))
    for changed in ({"max_seq_length": 30}, {"packing_buffer_size": 11}):
        resumed = module(mixed, **{**PACKED, **changed})
        resumed.load_state_dict(reference.state_dict())
        with pytest.raises(UserError, match=f"{next(iter(changed))} was"):
            resumed.train_dataloader()


def test_bucketed_batches_hold_one_shape_without_padding(mixed):
    data = module(mixed, bucket_by_shape=True, micro_batch_size=3, global_batch_size=3, virtual_epoch_length=20)
    batches = list(data.train_dataloader())
    for batch in batches:
        assert len({tuple(shape) for shape in batch["latent_shape"].tolist()}) == 1
        assert batch["loss_mask"].all()
        assert len(batch["__key__"]) == 3
    assert len({tuple(batch["latent_shape"][0].tolist()) for batch in batches}) == 7
    assert data.task_encoder.positions.used_share == 1


def test_bucketed_validation_covers_the_split_with_smaller_batches(mixed):
    batches = list(module(mixed, bucket_by_shape=True, micro_batch_size=3, global_batch_size=3).val_dataloader())
    assert sorted(flat(rows(batches))) == list(range(30, 40))
    assert all(len({tuple(shape) for shape in batch["latent_shape"].tolist()}) == 1 for batch in batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bucketed_batches_resume_at_the_next_one(mixed, num_workers):
    options = {"bucket_by_shape": True, "micro_batch_size": 2, "global_batch_size": 2, "virtual_epoch_length": 10}
    reference = module(mixed, **options, num_workers=num_workers)
    stream, states = [], []
    for batch in reference.train_dataloader():
        stream.append(batch["__key__"])
        states.append(through_a_checkpoint(reference.state_dict()))
    for done in (2, 5, 9) if num_workers == 0 else (5,):
        resumed = module(mixed, **options, num_workers=num_workers)
        resumed.load_state_dict(states[done - 1])
        assert [batch["__key__"] for batch in resumed.train_dataloader()] == stream[done:]


def test_a_state_without_buckets_is_refused_with_them(mixed):
    reference = module(mixed)
    next(iter(reference.train_dataloader()))
    resumed = module(mixed, bucket_by_shape=True)
    resumed.load_state_dict(reference.state_dict())
    with pytest.raises(UserError, match="bucket_by_shape was False, now True"):
        resumed.train_dataloader()
