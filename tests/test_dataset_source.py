from collections import Counter
from pathlib import Path

import pytest

from diffusion_data.dataset_source import open_source
from diffusion_data.errors import UserError
from tests.datamodules import as_rank, flat, module, rows, through_a_checkpoint
from tests.tiny_dataset import tiny_sample, write_dataset

HEAD = "__module__: megatron.energon\n__class__: MetadatasetV2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a: rows 0 to 7 to train on, 8 and 9 to validate on; b: rows 100 to 103, no val split."""
    folder = tmp_path_factory.mktemp("blend")
    write_dataset(folder / "a", [tiny_sample(row) for row in range(10)], per_shard=2, split={"train": 4, "val": 1})
    write_dataset(folder / "b", [tiny_sample(row, (4, 1, 2, 4)) for row in range(100, 104)])
    return folder


def blend_of(folder: Path, **weights: float) -> list[dict]:
    return [{"path": str(folder / name), "weight": weight} for name, weight in weights.items()]


def write_yaml(folder: Path, text: str, name: str = "blend.yaml") -> Path:
    file = folder / name
    file.write_text(HEAD + text)
    return file


def test_a_list_of_paths_is_blended_by_weight(folder):
    data = module(blend_of(folder, a=1, b=3), virtual_epoch_length=400)
    seen = Counter(row >= 100 for row in flat(rows(data.train_dataloader())))
    assert 260 <= seen[True] <= 340
    assert len(module(blend_of(folder, a=1, b=3)).train_dataloader()) == 12


def test_each_dataset_of_a_blend_is_passed_over_by_itself(folder):
    seen = flat(rows(module(blend_of(folder, a=1, b=1), virtual_epoch_length=60).train_dataloader()))
    for of_dataset in ([row for row in seen if row < 100], [row for row in seen if row >= 100]):
        size = len(set(of_dataset))
        assert size in (8, 4)
        for start in range(0, len(of_dataset) - size + 1, size):
            assert len(set(of_dataset[start : start + size])) == size


def test_val_splits_of_a_blend_come_one_after_another(folder, monkeypatch):
    assert rows(module(blend_of(folder, a=1, b=3)).val_dataloader()) == [[8], [9]]
    everything = module(blend_of(folder, a=1, b=3), use_train_split_for_val=True)
    assert flat(rows(everything.val_dataloader())) == [*range(8), *range(100, 104)]
    shares = []
    for rank in range(5):
        as_rank(monkeypatch, rank, 5)
        loader = module(blend_of(folder, a=1, b=3), use_train_split_for_val=True, global_batch_size=5).val_dataloader()
        shares.append(rows(loader))
        assert len(shares[-1]) == len(loader) == 3
    assert sorted(flat(flat(shares))) == [*range(8), *range(100, 104)]


def test_subflavors_reach_the_batch(folder):
    blend = blend_of(folder, a=1, b=1)
    blend[1]["subflavors"] = {"source": "b", "quality": 2}
    for batch in module(blend, virtual_epoch_length=20).train_dataloader():
        is_b = int(batch["__key__"][0][-9:]) >= 100
        assert batch.get("__subflavors__", [{}]) == [{"source": "b", "quality": 2} if is_b else {}]


def test_blends_resume_at_the_next_batch(folder):
    for options in (
        {"micro_batch_size": 2, "global_batch_size": 2},
        {"max_seq_length": 8, "packing_buffer_size": 4},
        {"bucket_by_shape": True, "micro_batch_size": 2, "global_batch_size": 2},
    ):
        blend, options = blend_of(folder, a=1, b=2), {**options, "virtual_epoch_length": 20}
        reference = module(blend, **options)
        iterator = iter(reference.train_dataloader())
        for _ in range(7):
            next(iterator)
        state = through_a_checkpoint(reference.state_dict())
        resumed = module(blend, **options)
        resumed.load_state_dict(state)
        assert rows(resumed.train_dataloader()) == rows(iterator)
        reweighted = module(blend_of(folder, a=1, b=3), **options)
        reweighted.load_state_dict(state)
        with pytest.raises(UserError, match="dataset was"):
            reweighted.train_dataloader()


def test_a_metadataset_names_splits_weights_and_subflavors(folder):
    file = write_yaml(
        folder,
        """
splits:
  train:
    blend:
      - {path: a, weight: 1, subflavors: {source: first}}
      - {path: b, weight: 3}
  val:
    path: a
    subset: {range: [50%, 100%]}
""",
    )
    data = module(file, virtual_epoch_length=200)
    batches = list(data.train_dataloader())
    assert 120 <= sum(int(batch["__key__"][0][-9:]) >= 100 for batch in batches) <= 180
    assert {"source": "first"} in [batch["__subflavors__"][0] for batch in batches if "__subflavors__" in batch]
    assert rows(data.val_dataloader()) == [[9]]
    assert len(data.val_dataloader()) == 1


def test_each_dataset_of_the_train_split_counts_once_in_statistics(folder):
    file = write_yaml(
        folder, "splits: {train: {blend: [{path: a}, {path: a}, {path: b}]}, val: {path: c}}", "named_often.yaml"
    )
    write_dataset(folder / "c", [tiny_sample(row) for row in range(2)], per_shard=1, split={"train": 1, "val": 1})
    source = open_source(file)
    assert [folder.path.name for folder in source.folders] == ["a", "b", "c"]
    assert [folder.path.name for folder in source.train_folders] == ["a", "b"]


def test_an_epochized_blend_has_exact_passes(folder):
    file = write_yaml(
        folder, "splits: {train: {blend_epochized: [{path: a}, {path: b, repetitions: 2}]}}", "epochs.yaml"
    )
    data = module(file, repeat=False)
    loader = data.train_dataloader()
    assert len(loader) == 16
    for _ in range(2):
        counts = Counter(flat(rows(loader)))
        assert counts == Counter(dict.fromkeys(range(8), 1) | dict.fromkeys(range(100, 104), 2))


def test_a_metadataset_may_name_another(folder):
    write_yaml(folder, "splits: {train: {blend: [{path: b, weight: 2}]}}", "inner.yaml")
    file = write_yaml(folder, "splits: {train: {blend: [{path: inner.yaml}]}}", "outer.yaml")
    assert set(flat(rows(module(file, virtual_epoch_length=8).train_dataloader()))) == set(range(100, 104))
    assert [str(each.path) for each in open_source(file).folders] == [str(folder / "b")]


def test_a_change_in_a_metadataset_that_another_names_is_another_dataset(folder):
    file = write_yaml(folder, "splits: {train: {blend: [{path: within.yaml}, {path: a}]}}", "around.yaml")
    identities = []
    for weight in (1, 50, 1):
        write_yaml(folder, f"splits: {{train: {{blend: [{{path: b, weight: {weight}}}, {{path: a}}]}}}}", "within.yaml")
        identities.append(open_source(file).identity)
    assert identities[0] == identities[2] != identities[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("splits: {train: {join: [{path: a}], joiner: {__module__: os, __function__: system}}}", "holds join, joiner"),
        ("splits: {train: {path: a, dataset_config: evil.yaml}}", "holds dataset_config"),
        ("splits: {train: {path: a, aux: {media: b}}}", "holds aux"),
        ("splits: {train: {path: a, subflavors: {x: {__module__: os, __function__: getcwd}}}}", "only names and plain"),
        ("splits: {train: {blend: [{path: a, weight: -1}]}}", "weight must be a number above 0, got -1"),
        ("splits: {train: {blend: [{path: a, repetitions: 2}]}}", "holds repetitions"),
        ("splits: {train: {path: missing}}", "missing does not exist"),
        ("splits: {train: {path: bad.yaml}}", "more than 8 deep"),
        ("splits: []", "splits must map"),
        ("splits: {train: {path: a}}\nmore: 1", "holds more"),
    ],
)
def test_a_metadataset_that_names_anything_else_is_refused(folder, text, message):
    with pytest.raises(UserError, match=message):
        open_source(write_yaml(folder, text, "bad.yaml"))


def test_the_first_kind_of_metadataset_is_refused(folder):
    file = folder / "old.yaml"
    file.write_text("__module__: megatron.energon\n__class__: Metadataset\nsplits: {}\n")
    with pytest.raises(UserError, match="__class__: MetadatasetV2"):
        open_source(file)


def test_every_dataset_of_a_blend_is_checked(folder, tmp_path):
    write_dataset(tmp_path / "c", [tiny_sample(0)])
    (tmp_path / "c" / ".nv-meta" / "dataset.yaml").write_text("__module__: os\n__class__: system\n")
    file = write_yaml(tmp_path, "splits: {train: {path: c}}")
    for path in (file, [*blend_of(folder, a=1), *blend_of(tmp_path, c=1)]):
        with pytest.raises(UserError, match=r"os\.system"):
            open_source(path)


def test_lists_that_are_no_blend_are_refused(folder):
    with pytest.raises(UserError, match="list of"):
        open_source([])
    with pytest.raises(UserError, match="not wieght"):
        open_source([{"path": str(folder / "a"), "wieght": 1}])
    with pytest.raises(UserError, match="a blend by weight has no end"):
        module(blend_of(folder, a=1, b=1), repeat=False).train_dataloader()


def test_a_rare_dataset_of_a_blend_is_waited_for(folder):
    """The common one's samples are all too long; the error comes only if nothing is usable."""
    data = module(blend_of(folder, a=0.98, b=0.02), seq_length=2, virtual_epoch_length=3)
    assert set(flat(rows(data.train_dataloader()))) <= set(range(100, 104))
    with pytest.raises(UserError, match="no sample could be used"):
        rows(module(blend_of(folder, a=0.98, b=0.02), seq_length=1).train_dataloader())


def test_object_stores_are_read_through_multi_storage_client(folder, tmp_path, monkeypatch):
    config = tmp_path / "msc.yaml"
    config.write_text(f"profiles:\n  store:\n    storage_provider: {{type: file, options: {{base_path: {folder}}}}}\n")
    monkeypatch.setenv("MSC_CONFIG", str(config))
    assert set(flat(rows(module("msc://store/b").train_dataloader()))) == set(range(100, 104))
    blend = [{"path": "msc://store/a"}, {"path": "msc://store/b", "weight": 2}]
    assert set(flat(rows(module(blend, virtual_epoch_length=60).train_dataloader()))) == {*range(8), *range(100, 104)}
