import pytest

from diffusion_data import energon_loaders
from diffusion_data.diffusion_taskencoder import BasicDiffusionTaskEncoder
from diffusion_data.errors import UserError
from diffusion_data.sample_filters import parse_filters
from tests.datamodules import flat, module, rows
from tests.tiny_dataset import tiny_sample, write_dataset

SAMPLES = [
    tiny_sample(0, aesthetic_score=4.9, clip_score=0.5),
    tiny_sample(1, aesthetic_score=5.0, clip_score=0.5),
    tiny_sample(2, aesthetic_score=7.0, clip_score=0.2),
    tiny_sample(3, aesthetic_score=7.0),
    tiny_sample(4, clip_score=0.5),
    tiny_sample(5, (4, 3, 4, 4), aesthetic_score=6.0, clip_score=0.5),
    tiny_sample(6, aesthetic_score=None, clip_score=0.5),
]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("scored") / "ds", SAMPLES)


def used_and_skipped(path, **options):
    data = module(path, task_encoder=BasicDiffusionTaskEncoder(**options), use_train_split_for_val=True)
    used = flat(rows(data.val_dataloader()))
    return used, data.task_encoder.skips.by_reason()


def test_bounds_hold_both_ends_included_and_are_combined(scored):
    filters = {"aesthetic_score": {"min": 5, "max": 6}, "clip_score": {"min": 0.3}}
    used, skipped = used_and_skipped(scored, filters=filters)
    assert used == [1, 5]
    assert skipped == {"aesthetic_score_out_of_bounds": 3, "without_aesthetic_score": 2}


def test_samples_without_the_field_are_kept_on_request(scored):
    used, skipped = used_and_skipped(scored, filters={"aesthetic_score": {"min": 5, "missing": "keep"}})
    assert used == [1, 2, 3, 4, 5, 6]
    assert skipped == {"aesthetic_score_out_of_bounds": 1}


def test_frames_are_limited_by_the_field_num_frames(scored):
    used, skipped = used_and_skipped(scored, filters={"num_frames": {"max": 8}})
    assert used == [0, 1, 2, 3, 4, 6]
    assert skipped == {"num_frames_out_of_bounds": 1}


def test_the_magnitude_is_limited(scored):
    used, skipped = used_and_skipped(scored, max_magnitude=65.0)  # latents count up to row + 63
    assert used == [0, 1, 2]
    assert skipped == {"too_large_values": 4}


def test_a_mistyped_field_stops_with_its_name(scored):
    with pytest.raises(UserError, match=r"all were skipped \(by reason: without_aesthetic_scor 7\)"):
        used_and_skipped(scored, filters={"aesthetic_scor": {"min": 5}})


def test_a_value_that_is_no_number_makes_a_sample_unreadable(tmp_path):
    path = write_dataset(tmp_path / "ds", [tiny_sample(0, score="good"), tiny_sample(1, score=1)])
    assert used_and_skipped(path, filters={"score": {"min": 0}}) == ([1], {"unreadable": 1})


@pytest.mark.parametrize("options", [{"max_seq_length": 12, "packing_buffer_size": 3}, {"bucket_by_shape": True}])
def test_packed_and_bucketed_batches_are_filtered(scored, options):
    encoder = BasicDiffusionTaskEncoder(filters={"clip_score": {"min": 0.3}})
    data = module(scored, task_encoder=encoder, use_train_split_for_val=True, **options)
    assert sorted(flat(rows(data.val_dataloader()))) == [0, 1, 4, 5, 6]
    assert encoder.skips.by_reason() == {"clip_score_out_of_bounds": 1, "without_clip_score": 1}


@pytest.mark.parametrize(
    "options", [{"max_seq_length": 12, "packing_buffer_size": 3}, {"bucket_by_shape": True}, {"micro_batch_size": 2}]
)
def test_a_stream_of_which_all_is_filtered_stops(scored, options):
    encoder = BasicDiffusionTaskEncoder(filters={"clip_score": {"min": 9}})
    data = module(scored, task_encoder=encoder, global_batch_size=2, **options)
    with pytest.raises(UserError, match="no sample could be used"):
        next(iter(data.train_dataloader()))


def test_other_filters_refuse_a_place_in_the_stream(scored):
    states = module(scored, task_encoder=BasicDiffusionTaskEncoder(filters={"clip_score": {"min": 0.3}}))
    next(iter(states.train_dataloader()))
    resumed = module(scored)
    resumed.load_state_dict(states.state_dict())
    with pytest.raises(UserError, match="filters was"):
        resumed.train_dataloader()


def test_skips_are_logged_when_an_epoch_ends_and_only_if_there_are_new_ones(scored, caplog):
    encoder = BasicDiffusionTaskEncoder(filters={"clip_score": {"min": 0.3, "missing": "keep"}})
    data = module(scored, task_encoder=encoder)
    list(data.train_dataloader())
    assert "samples skipped so far, by reason: clip_score_out_of_bounds" in caplog.messages[-1]
    caplog.clear()
    data.teardown()
    assert not caplog.messages


def test_skips_are_logged_at_intervals_within_an_epoch(scored, caplog, monkeypatch):
    monkeypatch.setattr(energon_loaders, "_BATCHES_A_REPORT", 4)
    encoder = BasicDiffusionTaskEncoder(filters={"clip_score": {"min": 0.3, "missing": "keep"}})
    batches = iter(module(scored, task_encoder=encoder, virtual_epoch_length=100).train_dataloader())
    for _ in range(5):
        next(batches)
    assert any("samples skipped so far, by reason: clip_score_out_of_bounds" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"a": 5}, r"a needs min or max .* as in \{a: \{min: 5\}\}"),
        ({"a": {}}, "a needs min or max"),
        ({"a": {"minimum": 5}}, "a needs min or max"),
        ({"a": {"min": "5"}}, "min of a must be a number, got '5'"),
        ({"a": {"min": 5, "max": 4}}, "no a is both at least 5 and at most 4"),
        ({"a": {"min": 5, "missing": "drop"}}, "must be skip or keep"),
    ],
)
def test_filters_that_are_none_are_refused(filters, message):
    with pytest.raises(UserError, match=message):
        parse_filters(filters)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [({"min": 0.6}, "clip_score 0.5 is below 0.6"), ({"max": 0.4}, "clip_score 0.5 is above 0.4")],
)
def test_a_skip_names_the_bound_that_is_crossed(bounds, message):
    (bound,) = parse_filters({"clip_score": bounds})
    assert bound.reason_to_skip({"clip_score": 0.5}) == ("clip_score_out_of_bounds", message)
