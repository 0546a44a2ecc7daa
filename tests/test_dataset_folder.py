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
    stats = read_stats(folder)
    assert stats is not None
    assert stats["latent_shapes"] == [[4, 1, 4, 4, 6]]
    assert stats["latent_mean"] == pytest.approx([10, 26, 42, 58])
    assert stats["latent_std"] == pytest.approx([(85 / 4 + 35 / 12) ** 0.5] * 4)  # of 16 numbers and of 6 rows


def test_excluded_shards_are_not_counted(dataset):
    split = dataset / ".nv-meta" / "split.yaml"
    split.write_text(split.read_text().replace("exclude: []", "exclude: [shard_000000.tar]"))
    assert check_dataset(dataset).samples == {"train": 2, "val": 2}


def test_a_copy_has_the_same_identity_and_another_dataset_has_not(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    other = write_dataset(tmp_path / "other", [tiny_sample(i) for i in range(5)], per_shard=2)
    assert check_dataset(tmp_path / "copy").identity == check_dataset(dataset).identity
    assert check_dataset(other).identity != check_dataset(dataset).identity


def test_datasets_of_other_writers_with_equal_shards_are_told_apart(tmp_path):
    """They have no fingerprint, and may have as many samples in shards of the same names."""
    first, second = (
        write_dataset(tmp_path / name, [tiny_sample(row) for row in range(start, start + 4)], per_shard=2)
        for name, start in [("first", 0), ("second", 200)]
    )
    assert not (first / "run" / "fingerprint.json").exists()
    assert check_dataset(first).identity != check_dataset(second).identity


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


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("shard_{000000..000001}.tar", 2),
        ("shard_{000000..000002..2}.tar", 2),
        ("shard_00000{0,2}.tar", 2),
        ("shard_000002.tar", 1),
    ],
)
def test_shards_may_be_named_by_a_pattern(dataset, pattern, named):
    (dataset / ".nv-meta" / "split.yaml").write_text(f"split_parts:\n  train: ['{pattern}']\nexclude: []\n")
    assert check_dataset(dataset).samples == {"train": 2 * named}


@pytest.mark.parametrize(
    "pattern",
    ["{0..99999999}", "{0..99}" * 5, "{a..z}", "{{0,1}{0,1},x}", "{0,1", "x" + "{0,1}" * 40, "{1.." + "9" * 5000 + "}"],
)
@pytest.mark.parametrize("field", ["train", "exclude"])
def test_a_pattern_of_more_names_than_shards_is_refused_before_it_is_spelt_out(dataset, pattern, field):
    fields = {"split_parts": {"train": ["shard_000000.tar"]}, "exclude": []}
    (fields if field == "exclude" else fields["split_parts"])[field] = [pattern]
    (dataset / ".nv-meta" / "split.yaml").write_text(json.dumps(fields))
    refused(dataset, "more than the 3 shards there are")


@pytest.mark.parametrize("count", [-5, True, 2.0, "2", None])
def test_a_count_that_is_no_count_is_refused(dataset, count):
    info = dataset / ".nv-meta" / ".info.json"
    whole = json.loads(info.read_text())
    whole["shard_counts"]["shard_000000.tar"] = count
    info.write_text(json.dumps(whole))
    refused(dataset, "'shard_000000.tar' has no sample count")


def test_files_that_grow_when_they_are_read_are_refused(dataset):
    """Aliases of aliases: nine lines of them stand for billions of values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    laughs = "\n".join(f"  {line}" for line in lines)
    for file, field in [("dataset.yaml", "subflavors"), ("split.yaml", "split_parts")]:
        whole = (dataset / ".nv-meta" / file).read_text()
        (dataset / ".nv-meta" / file).write_text(f"{whole}\n{field}:\n{laughs}\n")
        refused(dataset, file)
        (dataset / ".nv-meta" / file).write_text(whole)


@pytest.mark.parametrize("file", ["dataset.yaml", ".info.json", "split.yaml"])
def test_files_nested_without_end_are_refused(dataset, file):
    (dataset / ".nv-meta" / file).write_text("[" * 100_000)
    refused(dataset, file, "can't be read")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"latent_shapes": 3}',
        '{"latent_shapes": [[16, 1, 64]]}',
        '{"latent_shapes": [[16,1,2000000,2000000,1]]}',
    ],
)
def test_statistics_that_are_none_are_refused_by_name(dataset, content):
    (dataset / "run" / "stats.json").write_text(content)
    with pytest.raises(UserError, match=r"run/stats\.json is damaged.*remove it, or run prepare again"):
        read_stats(check_dataset(dataset))
