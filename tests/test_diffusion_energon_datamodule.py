import pickle
import shutil
import warnings
from collections import Counter

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from megatron.energon import stateless

from diffusion_data.diffusion_energon_datamodule import DiffusionDataModule
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.latent_sample import LatentSample, sample_key
from diffusion_data.parallel_ranks import DataParallel
from tests.datamodules import as_rank, flat, module, rows, through_a_checkpoint
from tests.test_safe_decoder import Hostile
from tests.tiny_dataset import tiny_sample, write_dataset, write_raw_dataset

TEN = [tiny_sample(row, (4, 1, 4, 4) if row % 3 else (4, 3, 2, 4), tokens=1 + row % 4) for row in range(10)]


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("ten") / "ds", TEN)


@pytest.fixture(scope="module")
def seven_and_three(tmp_path_factory):
    """7 samples to train on, 3 to validate on."""
    folder = tmp_path_factory.mktemp("split") / "ds"
    return write_dataset(folder, TEN, per_shard=1, split={"train": 7, "val": 3})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_gives_each_sample_once_in_random_order_and_the_next_another_order(ten, num_workers):
    loader = module(ten, num_workers=num_workers).train_dataloader()
    assert len(loader) == 10
    first, second = flat(rows(loader)), flat(rows(loader))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


def test_the_seed_decides_the_order(ten):
    orders = [rows(module(ten, seed=seed).train_dataloader()) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_an_epoch_is_rounded_up_to_whole_steps_and_equal_workers(ten):
    assert len(module(ten, micro_batch_size=2, global_batch_size=4).train_dataloader()) == 6
    assert len(module(ten, global_batch_size=8).train_dataloader()) == 16
    assert len(module(ten, num_workers=2, micro_batch_size=2, global_batch_size=2).train_dataloader()) == 6
    assert len(module(ten, virtual_epoch_length=4).train_dataloader()) == 4


def test_a_pass_that_was_left_early_is_finished_by_the_next(ten):
    loader = module(ten).train_dataloader()
    iterator = iter(loader)
    left = [next(iterator)["__key__"] for _ in range(4)]
    rest = [batch["__key__"] for batch in loader]
    assert len(rest) == 6
    assert len({key for keys in left + rest for key in keys}) == 10


def test_batches_hold_what_was_stored(ten):
    for batch in module(ten).train_dataloader():
        (row,) = (int(key[-9:]) for key in batch["__key__"])
        assert batch["latent_shape"][0].tolist() == list(TEN[row].latent.shape)
        assert batch["video"].shape == (1, 6, 16)
        assert batch["video"][0, 0, 0] == TEN[row].latent[0, 0, 0, 0]
        assert batch["t5_text_mask"].sum() == 1 + row % 4


def test_two_data_parallel_ranks_share_an_epoch(ten, monkeypatch):
    shares = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        shares.append(flat(rows(module(ten, global_batch_size=2, num_workers=1).train_dataloader())))
    assert not set(shares[0]) & set(shares[1])
    assert sorted(shares[0] + shares[1]) == list(range(10))


def test_seq_length_is_the_longest_of_the_dataset_after_max_frames(ten, tmp_path):
    assert next(iter(module(ten).train_dataloader()))["video"].shape[1] == 6
    short = module(ten, task_encoder=BasicDiffusionTaskEncoder(max_frames=1))
    assert next(iter(short.train_dataloader()))["video"].shape[1] == 4
    assert next(iter(module(ten, seq_length=9).train_dataloader()))["video"].shape[1] == 9
    without_stats = write_dataset(tmp_path / "ds", TEN[:2], with_stats=False)
    with pytest.raises(UserError, match=r"set data\.seq_length"):
        module(without_stats).train_dataloader()
    assert len(module(without_stats, seq_length=8).train_dataloader()) == 2


def test_two_different_seq_lengths_are_refused(ten):
    with pytest.raises(UserError, match="seq_length=8, but the task encoder was made with 6"):
        module(ten, seq_length=8, task_encoder=BasicDiffusionTaskEncoder(seq_length=6)).setup()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_is_one_pass_in_order_and_fresh_each_time(seven_and_three, num_workers):
    loader = module(seven_and_three, micro_batch_size=2, num_workers=num_workers, global_batch_size=2).val_dataloader()
    next(iter(loader))
    passes = [rows(loader) for _ in range(3)]
    assert passes[0] == passes[1] == passes[2]
    assert sorted(flat(passes[0])) == [7, 8, 9]
    assert len(passes[0]) == len(loader) == 2


def test_ranks_validate_equally_many_batches_and_every_sample_once(seven_and_three, monkeypatch):
    batches = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = module(seven_and_three, global_batch_size=2).val_dataloader()
        batches.append(list(loader))
        assert len(loader) == len(batches[-1]) == 2
    assert sorted(flat(rows(batches[0] + batches[1]))) == [7, 8, 9]
    (filler,) = [batch for batch in batches[0] + batches[1] if not batch["__key__"]]
    assert filler["video"].shape == batches[0][0]["video"].shape
    assert not filler["loss_mask"].any()
    assert filler["t5_text_mask"].any()


def test_the_test_split_is_one_pass_too(make_tiny_dataset):
    path = make_tiny_dataset(10, per_shard=2, split={"train": 3, "val": 1, "test": 1})
    data = module(path)
    loader = data.test_dataloader()
    assert rows(loader) == rows(loader) == [[8], [9]]
    assert rows(data.val_dataloader()) == [[6], [7]]
    assert module(make_tiny_dataset(2)).test_dataloader() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_pass_gives_each_sample_once_and_the_next_another_order(ten, num_workers):
    data = module(ten, repeat=False, micro_batch_size=3, global_batch_size=3, num_workers=num_workers)
    loader = data.train_dataloader()
    passes = [list(loader) for _ in range(3)]
    for batches in passes:
        assert len(batches) == len(loader) == 4
        assert sorted(flat(rows(batches))) == list(range(10))
    assert len({str(rows(batches)) for batches in passes}) == 3


def test_ranks_pass_over_equally_many_batches(seven_and_three, monkeypatch):
    seen = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        loader = module(seven_and_three, repeat=False, global_batch_size=2).train_dataloader()
        seen.append(list(loader))
        assert len(seen[-1]) == len(loader) == 4
    assert sorted(flat(rows(seen[0] + seen[1]))) == list(range(7))
    (filler,) = [batch for batch in seen[0] + seen[1] if not batch["__key__"]]
    assert not filler["loss_mask"].any()


@pytest.mark.parametrize(("num_workers", "places"), [(0, range(1, 6)), (2, (4, 5))])
def test_one_pass_resumes_from_anywhere_in_it(ten, num_workers, places):
    """Some samples are skipped, so that the pass ends with batches without samples."""
    options = {"seq_length": 4, "micro_batch_size": 2, "global_batch_size": 2, "repeat": False}
    reference = module(ten, **options, num_workers=num_workers)
    stream, states = [], []
    for _ in range(2):
        for batch in reference.train_dataloader():
            stream.append(batch["__key__"])
            states.append(through_a_checkpoint(reference.state_dict()))
    per_pass = len(stream) // 2
    assert len({key for keys in stream[:per_pass] for key in keys}) == 6
    assert [] in stream[:per_pass]
    for done in places:
        resumed = module(ten, **options, num_workers=num_workers)
        resumed.load_state_dict(states[done - 1])
        rest = [batch["__key__"] for _ in range(2) for batch in resumed.train_dataloader()]
        assert rest[: len(stream) - done] == stream[done:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_pass_over_nothing_usable_stops(ten, num_workers):
    with pytest.raises(UserError, match="no sample could be used"):
        rows(module(ten, seq_length=3, repeat=False, num_workers=num_workers).train_dataloader())


def test_a_place_of_several_ranks_without_a_process_group_is_an_error_in_one_line(ten):
    data = module(ten, global_batch_size=2, parallel=DataParallel(rank=0, size=2))
    next(iter(data.train_dataloader()))
    with pytest.raises(UserError, match="init_process_group first"):
        data.state_dict()


def test_one_pass_excludes_what_has_no_countable_batches(ten):
    for options in (
        {"virtual_epoch_length": 4},
        {"bucket_by_shape": True},
        {"max_seq_length": 8, "packing_buffer_size": 2},
    ):
        with pytest.raises(UserError, match="repeat=False"):
            module(ten, repeat=False, **options)


def test_texts_are_padded_to_the_longest_of_their_batch_on_request(ten):
    encoder = BasicDiffusionTaskEncoder(text_padding="longest", text_embedding_padding_size=3)
    for batch in module(ten, task_encoder=encoder, micro_batch_size=2, global_batch_size=2).train_dataloader():
        lengths = batch["seq_len_kv"]
        assert batch["t5_text_embeddings"].shape[1] == batch["t5_text_mask"].shape[1] == lengths.max() <= 3
        for row, key in enumerate(batch["__key__"]):
            values = batch["t5_text_embeddings"][row, :, 0]
            assert (values[: lengths[row]] == int(key[-9:]) + 1).all()
            assert not values[lengths[row] :].any()
    with pytest.raises(UserError, match="text_padding must be one of fixed, longest"):
        BasicDiffusionTaskEncoder(text_padding="short")


def test_validation_without_a_val_split(ten):
    assert module(ten).val_dataloader() == []
    assert rows(module(ten, use_train_split_for_val=True).val_dataloader()) == [[row] for row in range(10)]


def test_a_dataset_without_a_train_split_is_refused(tmp_path):
    path = write_dataset(tmp_path / "ds", TEN[:2], split={"train": 0, "val": 1})
    with pytest.raises(UserError, match=r"no samples in the split 'train'.*val 2"):
        module(path).train_dataloader()


@pytest.mark.parametrize("shuffle_buffer_size", [4, 100])
def test_resumes_at_the_next_batch_from_anywhere(ten, shuffle_buffer_size):
    options = {"micro_batch_size": 2, "global_batch_size": 2, "shuffle_buffer_size": shuffle_buffer_size}
    reference = module(ten, **options)
    loader = reference.train_dataloader()
    stream, states = [], []
    for _ in range(4):
        for batch in loader:
            stream.append(batch["__key__"])
            states.append(through_a_checkpoint(reference.state_dict()))
    for done, state in enumerate(states[:10], start=1):
        resumed = module(ten, **options)
        resumed.load_state_dict(state)
        # A pass that was interrupted is finished first, so that epochs keep their length.
        rest = [batch["__key__"] for _ in range(2) for batch in resumed.train_dataloader()]
        assert rest == stream[done : done + len(rest)]
        assert len(rest) == 10 - done % 5


def test_resumes_with_workers_outside_lightning(ten):
    options = {"num_workers": 2, "virtual_epoch_length": 6}
    reference = module(ten, **options)
    iterator = iter(reference.train_dataloader())
    for _ in range(3):
        next(iterator)
    state = through_a_checkpoint(reference.state_dict())
    rest = rows(iterator)
    resumed = module(ten, **options)
    resumed.load_state_dict(state)
    assert rows(resumed.train_dataloader()) == rest
    assert len(rest) == 3


def test_a_place_that_was_resumed_and_saved_again_is_the_right_one(ten):
    """Also of a worker that has given nothing since it was resumed."""
    options = {"num_workers": 2, "virtual_epoch_length": 12}
    stream = rows(module(ten, **options).train_dataloader())
    state, seen = {}, []
    for batches in (5, 1, 2):
        resumed = module(ten, **options)
        resumed.load_state_dict(state)
        iterator = iter(resumed.train_dataloader())
        seen += rows(next(iterator) for _ in range(batches))
        state = through_a_checkpoint(resumed.state_dict())
        resumed.teardown()
    assert seen == stream[:8]


def test_goes_on_after_its_workers_were_ended(ten):
    data = module(ten, num_workers=1)
    iterator = iter(data.train_dataloader())
    begun = [next(iterator)["__key__"] for _ in range(4)]
    data.teardown()
    assert data.state_dict()["batches_done"] == 4
    assert begun + [batch["__key__"] for batch in data.train_dataloader()] == [
        batch["__key__"] for batch in module(ten, num_workers=1).train_dataloader()
    ]


def test_a_state_that_was_loaded_and_not_used_is_saved_again(ten):
    reference = module(ten)
    next(iter(reference.train_dataloader()))
    state = reference.state_dict()
    resumed = module(ten)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize(
    "changed",
    [{"num_workers": 2}, {"micro_batch_size": 2}, {"shuffle_buffer_size": 7}, {"virtual_epoch_length": 4}, {"seed": 3}],
)
def test_refuses_to_resume_with_changed_settings(ten, changed):
    options = {"global_batch_size": 2, **changed}
    reference = module(ten, global_batch_size=2)
    next(iter(reference.train_dataloader()))
    resumed = module(ten, **options)
    resumed.load_state_dict(reference.state_dict())
    with pytest.raises(UserError, match=f"{next(iter(changed))} was"):
        resumed.train_dataloader()


def test_refuses_to_resume_on_another_dataset_or_number_of_ranks(ten, seven_and_three, monkeypatch):
    reference = module(ten)
    next(iter(reference.train_dataloader()))
    state = reference.state_dict()
    other = module(seven_and_three)
    other.load_state_dict(state)
    with pytest.raises(UserError, match=rf"dataset was {ten} \(\w{{12}}\), now {seven_and_three} \(\w{{12}}\); "):
        other.train_dataloader()
    as_rank(monkeypatch, 0, 2)
    two_ranks = module(ten, global_batch_size=2)
    two_ranks.load_state_dict(state)
    with pytest.raises(UserError, match="data_parallel_size was 1, now 2"):
        two_ranks.train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_whose_samples_are_all_skipped_stops(ten, num_workers):
    data = module(ten, seq_length=3, num_workers=num_workers, use_train_split_for_val=True)
    with pytest.raises(UserError, match=r"no sample could be used.*too_long \d+") as error:
        rows(data.train_dataloader())
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no sample could be used"):
        rows(data.val_dataloader())


def test_a_copy_of_the_dataset_elsewhere_resumes(ten, tmp_path):
    shutil.copytree(ten, tmp_path / "copy")
    reference = module(ten)
    batches = iter(reference.train_dataloader())
    next(batches)
    resumed = module(tmp_path / "copy")
    resumed.load_state_dict(reference.state_dict())
    assert rows([next(iter(resumed.train_dataloader()))]) == rows([next(batches)])


def test_skips_are_counted_across_workers(ten):
    data = module(ten, seq_length=4, num_workers=2, use_train_split_for_val=True)
    seen = Counter(flat(rows(data.val_dataloader())))
    assert seen == Counter([1, 2, 4, 5, 7, 8])  # rows 0, 3, 6 and 9 are clips of 6 patches
    assert data.task_encoder.skips.by_reason() == {"too_long": 4}


def test_broken_and_hostile_samples_are_left_out(tmp_path, caplog, capfd):
    marker = tmp_path / "ran"
    parts = {sample.key: sample.to_parts() for sample in TEN[:4]}
    parts[sample_key(0)]["pickle"] = pickle.dumps(Hostile(str(marker)))
    parts[sample_key(2)]["pth"] = b"torn"
    del parts[sample_key(3)]["pickle"]
    data = module(write_raw_dataset(tmp_path / "ds", parts), seq_length=8)
    assert rows(data.train_dataloader()) == [[1]] * 4
    assert not marker.exists()
    assert all(sample_key(row) in caplog.text for row in (0, 2, 3))
    assert "skipped samples/sample_000000000 of shard_000000.tar: unreadable: part 'pickle'" in caplog.text
    assert set(data.task_encoder.skips.by_reason()) == {"unreadable"}
    assert capfd.readouterr().out == ""


def test_keys_that_lead_out_of_a_folder_are_left_out(tmp_path, caplog, capfd):
    keys = ["/etc/passwd", "../../outside", "samples/inside"]
    parts = {key: sample.to_parts() for key, sample in zip(keys, TEN[:3], strict=True)}
    data = module(write_raw_dataset(tmp_path / "ds", parts), seq_length=8)
    assert {key for batch in data.train_dataloader() for key in batch["__key__"]} == {"samples/inside"}
    assert "skipped /etc/passwd of shard_000000.tar: unreadable: /etc/passwd: a key can't lead out" in caplog.text
    assert "../../outside" in caplog.text


def test_a_hostile_dataset_yaml_is_refused(tmp_path):
    path = write_dataset(tmp_path / "ds", TEN[:2])
    (path / ".nv-meta" / "dataset.yaml").write_text("__module__: os\n__class__: system\n")
    with pytest.raises(UserError, match=r"os\.system"):
        module(path).train_dataloader()


def test_a_sample_of_another_model_is_an_error_in_one_line(tmp_path):
    path = write_dataset(tmp_path / "ds", [tiny_sample(0), tiny_sample(1, text_dim=16)])
    for num_workers in (0, 1):
        data = module(path, micro_batch_size=2, global_batch_size=2, num_workers=num_workers)
        with pytest.raises(UserError, match="mixes the output of different models") as error:
            rows(data.train_dataloader())
        assert "\n" not in str(error.value)


def test_workers_without_samples_are_not_started(tmp_path, caplog):
    path = write_dataset(tmp_path / "ds", TEN[:2])
    with caplog.at_level("INFO"):
        loader = module(path, num_workers=4).train_dataloader()
    assert "2 workers a rank instead of 4" in caplog.text
    assert sorted(flat(rows(loader))) == [0, 1]


def test_more_ranks_than_samples_are_refused(tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "ds", TEN[:2])
    as_rank(monkeypatch, 0, 4)
    with pytest.raises(UserError, match="2 samples for 4 data-parallel ranks"):
        module(path, global_batch_size=4).train_dataloader()


def test_batch_sizes_that_do_not_fit_the_ranks_are_refused(ten, monkeypatch):
    with pytest.raises(UserError, match="not divisible"):
        DiffusionDataModule(ten, micro_batch_size=3, global_batch_size=8)
    as_rank(monkeypatch, 0, 3)
    data = module(ten, global_batch_size=8)
    with pytest.raises(UserError, match="3 data-parallel ranks"):
        data.train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_is_silent(ten, num_workers, capfd, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows(module(ten, num_workers=num_workers).train_dataloader())
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_arrays_in_batches_of_the_users_become_tensors(ten, num_workers):
    class Own(BasicDiffusionTaskEncoder):
        @stateless
        def batch(self, samples):
            return {**super().batch(samples), "score": np.ones(len(samples))}

    batch = next(iter(module(ten, task_encoder=Own(), num_workers=num_workers).train_dataloader()))
    assert torch.equal(batch["score"], torch.ones(1, dtype=torch.float64))
    assert set(next(iter(module(ten, num_workers=num_workers).train_dataloader()))) == batch.keys() - {"score"}


class Recorder(pl.LightningModule):
    """Learns nothing, notes the keys it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.trained: list[list[str]] = []
        self.validated: list[list[str]] = []

    def training_step(self, batch, _):
        self.trained.append(batch["__key__"])
        return self.layer(batch["video"].float().mean().view(1, 1)).sum()

    def validation_step(self, batch, _):
        self.validated.append(batch["__key__"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data, folder, max_steps: int, ckpt_path=None, **options) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


@pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_trains_validates_and_resumes_exactly_under_lightning(seven_and_three, tmp_path, num_workers):
    def data():
        return module(seven_and_three, num_workers=num_workers)

    whole = fit(data(), tmp_path / "whole", max_steps=12)
    assert len(whole.trained) == 12
    # Two batches of sanity checking, then after 3, 6, 9 and 12 batches.
    assert sorted(key[0][-1] for key in whole.validated[-3:]) == ["7", "8", "9"]
    assert len(whole.validated) == 2 + 4 * 3
    for step in (4, 7) if num_workers == 0 else (5, 8):  # within an epoch and at its end
        resumed = fit(data(), tmp_path / f"resumed{step}", 12, ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.trained == whole.trained[step:]
    limited = fit(data(), tmp_path / "limited", 12, limit_val_batches=2, num_sanity_val_steps=0)
    assert limited.trained == whole.trained
    assert limited.validated == 4 * whole.validated[:2]


def test_says_how_the_trainer_gets_the_global_batch_size(ten, tmp_path, caplog):
    fit(module(ten, global_batch_size=5), tmp_path, max_steps=1)
    assert "Trainer(accumulate_grad_batches=5)" in caplog.text


def test_a_latent_that_is_not_finite_never_reaches_a_batch(tmp_path):
    bad = LatentSample(**{**vars(TEN[1]), "text_embedding": np.full((2, 8), np.nan, dtype=np.float16)})
    path = write_dataset(tmp_path / "ds", [bad, TEN[2], TEN[4]])
    assert sorted(flat(rows(module(path, use_train_split_for_val=True).val_dataloader()))) == [2, 4]
