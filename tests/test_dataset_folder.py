import json
import shutil

import pytest

from diffusion_data.dataset_folder import check_dataset, read_stats
from diffusion_data.errors import UserError
from tests.tiny_dataset import tiny_sample, write_dataset


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "ds", [tiny_sample(i) for i in range(6)], per_shard=2, split={"train": 2, "val": 1})


def test_counts_the_samples_of_each_split(dataset):
    folder = check_dataset(dataset)
    assert folder.samples == {"train": 4, "val": 2}
    assert read_stats(folder) == {"latent_shapes": [[4, 1, 4, 4, 6]]}


def test_excluded_shards_are_not_counted(dataset):
    split = dataset / ".nv-meta" / "split.yaml"
    split.write_text(split.read_text().replace("exclude: []", "exclude: [shard_000000.tar]"))
    assert check_dataset(dataset).samples == {"train": 2, "val": 2}


def test_a_copy_has_the_same_identity_and_another_dataset_has_not(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    other = write_dataset(tmp_path / "other", [tiny_sample(i) for i in range(5)], per_shard=2)
    assert check_dataset(tmp_path / "copy").identity == check_dataset(dataset).identity
    assert check_dataset(other).identity != check_dataset(dataset).identity


def refused(path, *words):
    with pytest.raises(UserError) as error:
        check_dataset(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_is_not_a_dataset_is_refused_in_one_line(tmp_path):
    (tmp_path / "file.tar").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nothing", "nothing does not exist", "prepare_energon_dataset")
    refused(tmp_path / "file.tar", "is a file", "dataset folder")
    refused(tmp_path / "empty", "not a dataset", ".nv-meta/dataset.yaml", "energon prepare")
    refused("s3://bucket/ds", "msc://")


@pytest.mark.parametrize("missing", ["dataset.yaml", ".info.json", "split.yaml"])
def test_a_missing_file_is_named(dataset, missing):
    (dataset / ".nv-meta" / missing).unlink()
    refused(dataset, missing.removesuffix(".json"))


def test_a_missing_shard_is_named(dataset):
    (dataset / "shard_000001.tar").unlink()
    refused(dataset, "shard_000001.tar", "missing")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("__module__: os\n__class__: system\n", "os.system"),
        ("__module__: megatron.energon\n__class__: CaptioningWebdataset\n", "CaptioningWebdataset"),
        ("__module__: megatron.energon\n__class__: CrudeWebdataset\ndecoder: null\n", "decoder"),
        ("__module__: megatron.energon\n__class__: CrudeWebdataset\npart_filter: x.py:f\n", "part_filter"),
        ("__module__: megatron.energon\n__class__: CrudeWebdataset\npath: /etc\n", "path"),
        (
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
            "subflavors:\n  a:\n    __module__: os\n    __function__: getcwd\n",
            "subflavors",
        ),
        ("!!python/object/apply:os.getcwd []\n", "can't be read"),
        ("- a\n", "mapping"),
        ("", "dataset.yaml"),
        (": : :\n\t", "can't be read"),
    ],
)
def test_a_hostile_dataset_yaml_is_refused_before_energon_sees_it(dataset, text, word):
    (dataset / ".nv-meta" / "dataset.yaml").write_text(text)
    refused(dataset, word)


def test_plain_subflavors_are_allowed(dataset):
    file = dataset / ".nv-meta" / "dataset.yaml"
    file.write_text(file.read_text() + "subflavors:\n  source: butterflies\n  weight: 2\n")
    assert check_dataset(dataset).samples["train"] == 4


@pytest.mark.parametrize("name", ["/etc/shard.tar", "../other/shard.tar", "msc://elsewhere/shard.tar"])
def test_shards_outside_the_dataset_are_refused(dataset, name):
    (dataset / ".nv-meta" / "split.yaml").write_text(f"split_parts:\n  train: ['{name}']\nexclude: []\n")
    refused(dataset, "outside")


def test_other_fields_in_the_split_and_info_files_are_refused(dataset):
    info = dataset / ".nv-meta" / ".info.json"
    whole = json.loads(info.read_text())
    info.write_text(json.dumps({**whole, "__module__": "os"}))
    refused(dataset, "__module__")
    info.write_text(json.dumps(whole))
    with (dataset / ".nv-meta" / "split.yaml").open("a") as file:
        file.write("__class__: x\n")
    refused(dataset, "__class__")
