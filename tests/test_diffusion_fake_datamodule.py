import inspect
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_fake_datamodule import VideoLatentFakeDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.parallel_ranks import DataParallel
from tests.datamodules import as_rank, flat, module, rows, through_a_checkpoint
from tests.test_diffusion_energon_datamodule import Recorder
from tests.tiny_dataset import tiny_sample, write_dataset

SHAPES = [(4, 1, 4, 4), (4, 3, 4, 4)]


def fake(**options) -> VideoLatentFakeDataModule:
    small = {
        "seq_length": None,
        "global_batch_size": 2,
        "num_workers": 0,
        "num_train_samples": 10,
        "num_val_samples": 3,
        "latent_shapes": SHAPES,
        "text_lengths": (2, 5),
        "text_embedding_dim": 8,
    }
    return VideoLatentFakeDataModule(**{**small, **options})


def test_fake_and_real_batches_are_alike(tmp_path):
    samples = [tiny_sample(row, SHAPES[row % 2]) for row in range(4)]
    real = DiffusionDataModule(write_dataset(tmp_path / "ds", samples), None, 2, 2, num_workers=0)
    real_batch = next(iter(real.train_dataloader()))
    fake_batch = next(iter(fake(micro_batch_size=2).train_dataloader()))
    assert type(fake_batch) is type(real_batch) is dict
    assert list(fake_batch) == list(real_batch)
    for name, value in real_batch.items():
        if name == "__key__":
            assert [type(key) for key in fake_batch[name]] == [str, str]
        else:
            assert (fake_batch[name].shape, fake_batch[name].dtype) == (value.shape, value.dtype), name


def test_shapes_text_lengths_and_values_vary():
    batches = list(fake(num_train_samples=40).train_dataloader())
    assert {tuple(batch["latent_shape"][0].tolist()) for batch in batches} == set(SHAPES)
    assert {batch["seq_len_kv"].item() for batch in batches} == {2, 3, 4, 5}
    assert {batch["num_frames"].item() for batch in batches} == {1, 17}
    values = torch.cat([batch["video"][0][: batch["seq_len_q"].item()].float().flatten() for batch in batches])
    assert abs(values.mean()) < 0.1
    assert abs(values.std() - 1) < 0.1


def test_a_sample_is_the_same_whatever_the_batches_and_workers():
    alone = {batch["__key__"][0]: batch["video"][0] for batch in fake().train_dataloader()}
    assert len(alone) == 10
    for batch in fake(micro_batch_size=2, num_workers=1).train_dataloader():
        for key, video in zip(batch["__key__"], batch["video"], strict=True):
            assert torch.equal(video, alone[key])


def test_epochs_differ_and_leave_out_what_does_not_fill_a_step():
    loader = fake(global_batch_size=4).train_dataloader()
    first, second = rows(loader), rows(loader)
    assert len(loader) == len(first) == len(second) == 8
    assert first != second
    assert len(set(flat(first))) == 8


def test_ranks_share_an_epoch(monkeypatch):
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shares.append(flat(rows(fake().train_dataloader())))
    assert sorted(shares[0] + shares[1]) == list(range(10))


def test_validation_is_in_order_fresh_and_other_than_training(monkeypatch):
    data = fake()
    loader = data.val_dataloader()
    next(iter(loader))
    assert rows(loader) == rows(loader) == [[0], [1], [2]]
    trained = {batch["__key__"][0]: batch["video"] for batch in data.train_dataloader()}
    for batch in loader:
        assert batch["video"].shape != trained[batch["__key__"][0]].shape or not torch.equal(
            batch["video"], trained[batch["__key__"][0]]
        )
    assert len(rows(fake(use_train_split_for_val=True).val_dataloader())) == 10
    assert fake(num_val_samples=0).val_dataloader() == []
    as_rank(monkeypatch, 1, 2)
    assert rows(fake().val_dataloader()) == [[1], []]  # nothing is left for the second rank


def test_seq_length_pads_and_has_to_fit():
    assert next(iter(fake(seq_length=20).train_dataloader()))["video"].shape == (1, 20, 16)
    assert fake().seq_length == 12
    with pytest.raises(UserError, match="12 patches, more than seq_length=8"):
        fake(seq_length=8)
    with pytest.raises(UserError, match="whole patches"):
        fake(latent_shapes=[(4, 1, 3, 3)])
    assert fake(seq_length=4, task_encoder=BasicDiffusionTaskEncoder(max_frames=1)).seq_length == 4


def test_the_defaults_fit_together():
    batch = next(iter(VideoLatentFakeDataModule(num_workers=0).train_dataloader()))
    assert batch["video"].shape == (1, 2048, 64)
    assert batch["t5_text_embeddings"].shape == (1, 512, 1024)


def test_without_shapes_pictures_and_a_clip_fit_any_seq_length():
    assert VideoLatentFakeDataModule(seq_length=256).latent_shapes == [
        (16, 1, 32, 32),
        (16, 1, 22, 44),
        (16, 5, 14, 14),
    ]
    assert VideoLatentFakeDataModule(seq_length=1).latent_shapes == [(16, 1, 2, 2)]


def test_too_few_samples_and_unfit_batch_sizes_are_refused(monkeypatch):
    with pytest.raises(UserError, match="num_train_samples"):
        fake(num_train_samples=1).train_dataloader()
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(UserError, match="3 data-parallel ranks"):
        fake().train_dataloader()


def test_trains_validates_and_resumes_exactly_under_lightning(tmp_path):
    def fit(folder, ckpt_path=None):
        model = Recorder()
        trainer = pl.Trainer(
            max_steps=8,
            accelerator="cpu",
            logger=False,
            accumulate_grad_batches=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        )
        trainer.fit(model, fake(), ckpt_path=ckpt_path)
        return model

    whole = fit("whole")
    assert len(whole.trained) == 16
    assert len(whole.validated) == 2 + 3
    for step in (3, 5):  # within an epoch and at its end
        assert fit(f"resumed{step}", tmp_path / "whole" / f"step={step}.ckpt").trained == whole.trained[2 * step :]


PACKED = {"max_seq_length": 24, "packing_buffer_size": 6, "micro_batch_size": 2, "num_train_samples": 40}


def test_fake_and_real_packed_batches_are_alike(tmp_path):
    samples = [tiny_sample(row, SHAPES[row % 2]) for row in range(6)]
    options = {"max_seq_length": 24, "packing_buffer_size": 3, "micro_batch_size": 1}
    real = module(write_dataset(tmp_path / "ds", samples), **options, virtual_epoch_length=2)
    real_batch = next(iter(real.train_dataloader()))
    fake_batch = next(iter(fake(**options, num_train_samples=12).train_dataloader()))
    assert list(fake_batch) == list(real_batch)
    for name, value in real_batch.items():
        if name != "__key__":
            assert (fake_batch[name].ndim, fake_batch[name].dtype) == (value.ndim, value.dtype), name
    assert fake_batch["video"].shape == real_batch["video"].shape == (1, 24, 16)


def test_packed_samples_come_once_an_epoch_whatever_the_ranks(monkeypatch):
    whole = rows(fake(**PACKED).train_dataloader())
    assert len(set(flat(whole))) == len(flat(whole)) >= 30
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = fake(**PACKED, global_batch_size=4).train_dataloader()
        shares.append(rows(loader))
        assert len(loader) == len(shares[-1]) == len(whole) // 2
        assert flat(rows(loader)) != flat(shares[-1])
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == whole[: 2 * (len(whole) // 2)]


def test_packed_and_bucketed_validation_and_tests_cover_their_samples_once(monkeypatch):
    for options in (PACKED, {"bucket_by_shape": True, "micro_batch_size": 2}):
        for name in ("val_dataloader", "test_dataloader"):
            shares = []
            for rank in range(2):
                as_rank(monkeypatch, rank, 2)
                data = fake(**{**options, "global_batch_size": 4}, num_val_samples=7, num_test_samples=7)
                shares.append(rows(getattr(data, name)()))
            assert len(shares[0]) == len(shares[1])
            assert sorted(flat(shares[0] + shares[1])) == list(range(7))


def test_bucketed_batches_hold_one_shape():
    for batch in fake(bucket_by_shape=True, micro_batch_size=2, num_train_samples=20).train_dataloader():
        assert len({tuple(shape) for shape in batch["latent_shape"].tolist()}) == 1
        assert batch["loss_mask"].all()


def test_test_samples_are_other_ones():
    data = fake(num_test_samples=3)
    tested = {batch["__key__"][0]: batch["video"] for batch in data.test_dataloader()}
    assert len(tested) == 3
    for batch in data.val_dataloader():
        other = tested[batch["__key__"][0]]
        assert batch["video"].shape != other.shape or not torch.equal(batch["video"], other)


def test_packed_fake_batches_resume():
    reference = fake(**PACKED)
    loader = reference.train_dataloader()
    iterator = iter(loader)
    next(iterator)
    resumed = fake(**PACKED)
    resumed.load_state_dict(reference.state_dict())
    assert rows(resumed.train_dataloader()) == rows(iterator)


def test_captions_are_dropped_by_epoch_and_index_in_training_only():
    def lengths(loader):
        pairs = (zip(batch["__key__"], batch["seq_len_kv"].tolist(), strict=True) for batch in loader)
        return dict(pair for batch_pairs in pairs for pair in batch_pairs)

    data = fake(task_encoder=BasicDiffusionTaskEncoder(text_dropout=0.5), num_train_samples=40, num_val_samples=40)
    loader = data.train_dataloader()
    first, second = lengths(loader), lengths(loader)
    dropped = [sum(length == 1 for length in each.values()) for each in (first, second)]
    assert all(10 <= number <= 30 for number in dropped)
    assert first != second
    again = fake(
        task_encoder=BasicDiffusionTaskEncoder(text_dropout=0.5), num_train_samples=40, micro_batch_size=2
    ).train_dataloader()
    assert lengths(again) == first
    assert 1 not in lengths(data.val_dataloader()).values()


def test_takes_every_option_of_the_real_one_with_its_default():
    real = inspect.signature(DiffusionDataModule).parameters
    taken = inspect.signature(VideoLatentFakeDataModule).parameters
    assert {name for name in real if taken[name].default != real[name].default} == {"path", "seq_length"}


def test_options_of_reading_change_nothing_and_are_refused_as_by_the_real_one():
    reading = {"path": "ds", "shuffle_buffer_size": 1, "max_samples_per_sequence": 2, "read_ahead": 0}
    assert rows(fake(**reading).train_dataloader()) == rows(fake().train_dataloader())
    for unfit in ({"shuffle_buffer_size": 0}, {"virtual_epoch_length": 0}, {"max_samples_per_sequence": 0}):
        with pytest.raises(UserError, match=f"{next(iter(unfit))} must be at least 1, got 0"):
            fake(**unfit)
    for unfit in ({"virtual_epoch_length": 4}, {"bucket_by_shape": True}, PACKED):
        with pytest.raises(UserError, match="repeat=False"):
            fake(repeat=False, **unfit)


@pytest.mark.parametrize("length", [4, 25])  # shorter and longer than a pass
@pytest.mark.parametrize("num_workers", [0, 1])
def test_epochs_of_a_set_length_are_cut_from_the_same_stream(length, num_workers):
    whole = fake().train_dataloader()
    stream = [batch for _ in range(8) for batch in rows(whole)]
    data = fake(virtual_epoch_length=length, num_workers=num_workers)
    loader = data.train_dataloader()
    assert len(loader) == length
    epochs = [rows(loader), rows(loader)]
    assert [len(epoch) for epoch in epochs] == [length, length]
    assert epochs[0] + epochs[1] == stream[: 2 * length]
    iterator = iter(loader)
    next(iterator)
    resumed = fake(virtual_epoch_length=length)
    resumed.load_state_dict(through_a_checkpoint(data.state_dict()))
    assert rows(resumed.train_dataloader()) == stream[2 * length + 1 : 3 * length]


def test_nemos_virtual_epoch_length_is_taken():
    loader = fake(virtual_epoch_length=1_000_000_000).train_dataloader()
    assert len(loader) == 1_000_000_000
    assert next(iter(loader))["__key__"] == next(iter(fake().train_dataloader()))["__key__"]


@pytest.mark.parametrize(("ranks", "batches"), [(1, 4), (2, 2), (3, 2), (5, 1)])
def test_one_pass_gives_every_sample_once_on_some_rank(ranks, batches):
    options = {"repeat": False, "micro_batch_size": 2, "global_batch_size": 60, "num_train_samples": 7}
    loaders = [
        fake(**options, parallel=DataParallel(rank=rank, size=ranks)).train_dataloader() for rank in range(ranks)
    ]
    orders = []
    for _ in range(2):
        shares = [list(loader) for loader in loaders]
        assert {len(loader) for loader in loaders} == {len(share) for share in shares} == {batches}
        orders.append([int(key[-9:]) for share in shares for batch in share for key in batch["__key__"]])
        for share in shares:
            assert all(batch["loss_mask"].any() == bool(batch["__key__"]) for batch in share)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] != orders[1]


def test_a_given_rank_goes_before_the_environments(monkeypatch):
    as_rank(monkeypatch, 1, 2)
    of_rank = rows(fake().train_dataloader())
    as_rank(monkeypatch, 0, 1)
    assert rows(fake(parallel=DataParallel(rank=1, size=2)).train_dataloader()) == of_rank
    padded = fake(parallel=DataParallel(rank=0, size=1, length_multiple=8)).train_dataloader()
    assert next(iter(padded))["video"].shape == (1, 16, 16)  # 12 patches, rounded up


def test_latents_are_scaled_as_the_real_ones_are():
    def batches(latent_scaling):
        data = fake(task_encoder=BasicDiffusionTaskEncoder(latent_scaling=latent_scaling))
        return data.latent_scaling, torch.cat([batch["video"] for batch in data.train_dataloader()])

    no_scaling, raw = batches(None)
    halving, halved = batches(0.5)
    standardising, standardised = batches("per_channel")
    assert no_scaling is None
    assert torch.equal(halved, raw * 0.5)
    assert torch.equal(standardised, raw)  # mean 0 and deviation 1 already
    latent = torch.randn(4, 1, 4, 4)
    assert torch.equal(halving.invert(latent), latent * 2)
    assert torch.equal(standardising.shift, torch.zeros(4))
    assert torch.equal(standardising.invert(latent), latent)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"micro_batch_size": 2}, "micro_batch_size was 1, now 2"),
        ({"micro_batch_size": 2, "seed": 3}, "micro_batch_size was 1, now 2; seed was 0, now 3"),
        ({"global_batch_size": 4}, "global_batch_size was 2, now 4; virtual_epoch_length was 10, now 8"),
        ({"num_train_samples": 12}, "num_train_samples was 10, now 12"),
        ({"latent_shapes": SHAPES[:1]}, r"latent_shapes was \[\[4, 1, 4, 4\], \[4, 3, 4, 4\]\], now"),
        ({"parallel": DataParallel(rank=0, size=2)}, "data_parallel_size was 1, now 2"),
        ({"task_encoder": BasicDiffusionTaskEncoder(max_frames=1)}, "max_frames was None, now 1"),
        ({"bucket_by_shape": True}, "bucket_by_shape was False, now True"),
    ],
)
def test_refuses_to_resume_with_changed_settings(changed, message):
    reference = fake()
    next(iter(reference.train_dataloader()))
    resumed = fake(**changed)
    resumed.load_state_dict(through_a_checkpoint(reference.state_dict()))
    with pytest.raises(UserError, match=message) as error:
        resumed.train_dataloader()
    assert "Ranks and workers" not in str(error.value)  # only a real stream goes on with others
    assert resumed.state_dict() == reference.state_dict()  # still there


def test_goes_on_with_other_workers():
    reference = fake()
    iterator = iter(reference.train_dataloader())
    next(iterator)
    resumed = fake(num_workers=1)
    resumed.load_state_dict(reference.state_dict())
    assert rows(resumed.train_dataloader()) == rows(iterator)


def test_refuses_a_place_that_another_datamodule_saved():
    with pytest.raises(UserError, match="isn't one that this VideoLatentFakeDataModule saved"):
        fake().load_state_dict({"ranks": [], "batches_done": 3, "settings": {}})


def dit_config(**changes):
    """What NeMo's fake datamodule reads of its DiTConfig, with its values."""
    nemos = {"in_channels": 16, "patch_spatial": 2, "crossattn_emb_size": 1024}
    return SimpleNamespace(**{**nemos, "max_frames": 34, "max_img_h": 80, "max_img_w": 80, **changes})


def test_imitates_a_models_config():
    config = dit_config(in_channels=4, patch_spatial=4, crossattn_emb_size=32)
    data = VideoLatentFakeDataModule(config, 64, 1, 8, 0)
    batch = next(iter(data.train_dataloader()))
    assert batch["video"].shape == (1, 64, 4 * 4 * 4)
    assert batch["t5_text_embeddings"].shape == (1, 512, 32)
    assert data.latent_shapes == [(4, 1, 32, 32), (4, 1, 20, 40), (4, 5, 12, 12)]
    small = VideoLatentFakeDataModule(dit_config(max_frames=2, max_img_h=8, max_img_w=8), 256)
    assert small.latent_shapes == [(16, 1, 8, 8), (16, 1, 4, 8), (16, 2, 8, 8)]
    for_pictures = VideoLatentFakeDataModule(dit_config(max_frames=1, max_img_w=2), 256)
    assert for_pictures.latent_shapes == [(16, 1, 2, 2)]


def test_refuses_what_a_models_config_excludes():
    with pytest.raises(UserError, match="patch_spatial=4, but the task encoder was made with 2"):
        fake(model_config=dit_config(in_channels=4, patch_spatial=4), task_encoder=BasicDiffusionTaskEncoder())
    with pytest.raises(UserError, match=r"latent_shapes has \(4, 1, 4, 4\), but model_config tells of 16 channels"):
        fake(model_config=dit_config())
    with pytest.raises(UserError, match=r"latents of at most \(2, 80, 80\)"):
        fake(model_config=dit_config(in_channels=4, max_frames=2))
    with pytest.raises(UserError, match="in_channels of this int is None"):
        VideoLatentFakeDataModule(256)
