"""The whole job, from parquet to a dataset that reads back: exact values, accounting, resume, refusals."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import pickle
import re
import tarfile
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_data.batching import BatchingConfig
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.latent_sample import LatentSample
from diffusion_data.media import MediaConfig, MediaLoader
from diffusion_data.prepare_config import PrepareConfig, TextEncoderConfig, TokenizerConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.process_funcs import MediaSample, media_caption
from diffusion_data.t5_text_encoder import T5TextEncoder
from tests.small_source import picture_bytes, prepare_config, source_rows, write_source


def read_samples(dataset: Path) -> list[LatentSample]:
    """Every sample, in tar order, decoded by plain torch, pickle and json."""
    samples = []
    for path in sorted(dataset.glob("shard_*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in dict.fromkeys(name.rsplit(".", 1)[0] for name in members):
            parts = {
                "pth": torch.load(io.BytesIO(members[f"{key}.pth"]), weights_only=True),
                "pickle": pickle.loads(members[f"{key}.pickle"]),
                "json": json.loads(members[f"{key}.json"]),
            }
            samples.append(LatentSample.from_parts(key, parts))
    return samples


def tar_bytes(dataset: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(dataset.glob("shard_*.tar"))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 rows, of which one is torn and one has no caption, in shards of 4."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = source_rows(15)
    rows[5]["media"]["bytes"] = rows[5]["media"]["bytes"][:100]
    rows[6]["caption"] = None
    write_source(folder / "source.parquet", rows)
    prepare(prepare_config(folder / "source.parquet", folder / "dataset", split_ratio=(2, 1, 1)))
    return folder / "dataset"


def test_every_row_is_written_or_rejected_and_keys_are_row_numbers(prepared: Path) -> None:
    samples = read_samples(prepared)
    assert [sample.key for sample in samples] == [f"samples/sample_{row:09d}" for row in range(15) if row not in (5, 6)]
    rejected = [json.loads(line) for line in (prepared / "run/rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"], row["source_row"], row["score"]) for row in rejected] == [
        (5, "truncated", 5, 0.5),
        (6, "null_caption", 6, 0.6),
    ]


def test_latents_and_embeddings_are_those_of_the_encoders_alone(prepared: Path) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    text_encoder = T5TextEncoder.from_pretrained("tiny-t5")
    for sample in read_samples(prepared)[:3]:
        row = sample.metadata["source_row"]
        pixels = np.array(Image.open(io.BytesIO(source_rows(15)[row]["media"]["bytes"])).convert("RGB"))
        alone = tokenizer.encode(torch.from_numpy(pixels)[None, None])[0]
        # Batched and alone differ in the last bit of a bfloat16 at most.
        torch.testing.assert_close(sample.latent, alone, rtol=2**-7, atol=1e-2)
        embedding = text_encoder.encode([sample.metadata["caption"]])[0]
        np.testing.assert_allclose(sample.text_embedding, embedding, atol=2e-3)


def test_a_clip_keeps_its_frames_rate_and_shape(prepared: Path) -> None:
    clip = next(sample for sample in read_samples(prepared) if sample.metadata["source_row"] == 3)
    assert clip.latent.shape == (16, 3, 6, 8)
    assert (clip.metadata["num_frames"], clip.metadata["framerate"]) == (9, 8.0)


def test_metadata_tells_source_sizes_and_kept_columns(prepared: Path) -> None:
    assert read_samples(prepared)[1].metadata == {
        "caption": "picture very nice",
        "image_height": 48,
        "image_width": 64,
        "height": 48,
        "width": 64,
        "aspect_ratio": 1.333333,
        "resolution": "64x48",
        "num_frames": 1,
        "framerate": None,
        "num_text_tokens": len(T5TextEncoder.from_pretrained("tiny-t5").tokenize(["picture very nice"])[0]),
        "source_file": "source.parquet",
        "source_row": 1,
        "score": 0.1,
    }


def test_the_ledger_accounts_for_each_shard(prepared: Path) -> None:
    entries = [json.loads(path.read_text()) for path in sorted((prepared / "run/ledger").iterdir())]
    assert [(entry["start"], entry["stop"], entry["written"], len(entry["rejected"])) for entry in entries] == [
        (0, 4, 4, 0),
        (4, 8, 2, 2),
        (8, 12, 4, 0),
        (12, 15, 3, 0),
    ]
    for entry in entries:
        raw = (prepared / entry["file"]).read_bytes()
        assert (entry["num_bytes"], entry["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())


def test_stats_are_those_of_the_latents(prepared: Path) -> None:
    samples = read_samples(prepared)
    stats = json.loads((prepared / "run/stats.json").read_text())
    values = torch.cat([sample.latent.flatten(1).double() for sample in samples], 1)
    np.testing.assert_allclose(stats["latent_mean"], values.mean(1), atol=1e-9)
    np.testing.assert_allclose(stats["latent_std"], values.std(1, correction=0), atol=1e-9)
    assert (stats["rows"], stats["written"]) == (15, 13)
    assert stats["rejected"] == {"truncated": 1, "null_caption": 1}
    assert [16, 3, 6, 8, 2] in stats["latent_shapes"]
    assert sum(shape[-1] for shape in stats["latent_shapes"]) == 13


def test_the_empty_captions_embedding_is_stored(prepared: Path) -> None:
    stored = pickle.loads((prepared / "run/empty_caption.pickle").read_bytes())
    np.testing.assert_array_equal(stored, T5TextEncoder.from_pretrained("tiny-t5").encode([""])[0])


def test_energon_metadata_names_the_shards_of_each_split(prepared: Path) -> None:
    assert yaml.safe_load((prepared / ".nv-meta/dataset.yaml").read_text()) == {
        "__module__": "megatron.energon",
        "__class__": "CrudeWebdataset",
    }
    splits = yaml.safe_load((prepared / ".nv-meta/split.yaml").read_text())["split_parts"]
    assert sorted(len(files) for files in splits.values()) == [1, 1, 2]
    assert sorted(chain.from_iterable(splits.values())) == sorted(path.name for path in prepared.glob("*.tar"))
    info = json.loads((prepared / ".nv-meta/.info.json").read_text())
    assert sum(info["shard_counts"].values()) == 13


def test_nothing_temporary_stays(prepared: Path) -> None:
    assert not list(prepared.rglob("*.partial"))


def small(folder: Path, num_rows: int = 8) -> Path:
    return write_source(folder / "source.parquet", source_rows(num_rows))


def test_a_second_run_touches_no_shard_and_no_metadata(tmp_path: Path) -> None:
    config = prepare_config(small(tmp_path), tmp_path / "out")
    prepare(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    uuid = (tmp_path / "out/.nv-meta/index.uuid").read_text()
    totals = prepare(config)
    assert totals is not None
    assert (totals.rows, totals.written) == (8, 8)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")} == before
    assert (tmp_path / "out/.nv-meta/index.uuid").read_text() == uuid


@pytest.mark.parametrize("damage", ["no tar", "cut tar", "no ledger entry", "torn ledger entry", "partial file"])
def test_a_restart_makes_what_is_missing_with_the_same_bytes(tmp_path: Path, damage: str) -> None:
    config = prepare_config(small(tmp_path), tmp_path / "out")
    prepare(config)
    undisturbed = tar_bytes(tmp_path / "out")
    tar, entry = tmp_path / "out/shard_000001.tar", tmp_path / "out/run/ledger/shard_000001.json"
    match damage:
        case "no tar":
            tar.unlink()
        case "cut tar":
            tar.write_bytes(tar.read_bytes()[:-512])
        case "no ledger entry":
            entry.unlink()
        case "torn ledger entry":
            entry.write_text(entry.read_text()[:50])
        case "partial file":
            tar.rename(tar.with_name(f".{tar.name}.0.partial"))
    prepare(config)
    assert tar_bytes(tmp_path / "out") == undisturbed
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_workers_batches_of_work_and_ranks_change_no_byte(tmp_path: Path) -> None:
    source = small(tmp_path)
    prepare(prepare_config(source, tmp_path / "a", num_workers=0))
    prepare(prepare_config(source, tmp_path / "b", num_workers=2))
    assert tar_bytes(tmp_path / "a") == tar_bytes(tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"media": MediaConfig(short_side=64)}, r"media\.short_side: 48 -> 64"),
        ({"metadata_columns": ()}, r"metadata_columns\.0: 'score' -> None"),
        ({"samples_per_shard": 3}, r"samples_per_shard: 4 -> 3"),
        ({"text_encoder": TextEncoderConfig(name="tiny-t5", max_length=4)}, r"max_length: 512 -> 4"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    source = small(tmp_path, 4)
    prepare(prepare_config(source, tmp_path / "out"))
    with pytest.raises(UserError, match=rf"holds a run with other settings.*{field}"):
        prepare(prepare_config(source, tmp_path / "out", **options))


def test_a_changed_source_file_is_refused_by_name(tmp_path: Path) -> None:
    prepare(prepare_config(small(tmp_path, 4), tmp_path / "out"))
    with pytest.raises(UserError, match=r"source\.source\.parquet\.footer_sha256"):
        prepare(prepare_config(small(tmp_path, 5), tmp_path / "out"))


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and holds no run"):
        prepare(prepare_config(small(tmp_path, 4), tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_another_split_ratio_needs_no_new_shards(tmp_path: Path) -> None:
    source = small(tmp_path)
    prepare(prepare_config(source, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    totals = prepare(prepare_config(source, tmp_path / "out", split_ratio=(1, 1, 0)))
    assert totals is not None
    assert totals.splits == {"train": 4, "val": 4, "test": 0}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")} == before


def test_a_shard_whose_rows_are_all_rejected_leaves_no_tar(tmp_path: Path) -> None:
    rows = source_rows(8)
    for row in rows[4:]:
        row["caption"] = ""
    source = write_source(tmp_path / "source.parquet", rows)
    totals = prepare(prepare_config(source, tmp_path / "out"))
    assert totals is not None
    assert (totals.written, totals.rejected, totals.shards) == (4, {"null_caption": 4}, 1)
    assert list(tar_bytes(tmp_path / "out")) == ["shard_000000.tar"]
    prepare(prepare_config(source, tmp_path / "out"))  # and it counts as finished


def test_a_run_without_a_single_sample_says_why(tmp_path: Path) -> None:
    rows = [{**row, "caption": None} for row in source_rows(4)]
    rows[0]["caption"] = 3  # keeps the column's type from being null
    source = write_source(tmp_path / "source.parquet", rows)
    with pytest.raises(UserError, match=r"every row was rejected \(caption_not_text 1, null_caption 3\)"):
        prepare(prepare_config(source, tmp_path / "out"))


def test_too_many_rejects_stop_the_run_with_their_reasons(tmp_path: Path) -> None:
    rows = [{"media": {"bytes": b"no picture", "path": None}, "caption": "x", "score": 0.0}] * 320
    rows[0] = source_rows(1)[0]
    source = write_source(tmp_path / "source.parquet", rows)
    with pytest.raises(UserError, match=r"319 of 320 rows were rejected, more than 5%.*not_media 319"):
        prepare(prepare_config(source, tmp_path / "out", samples_per_shard=320))


def test_a_missing_column_is_named_before_any_work(tmp_path: Path) -> None:
    func = {"_target_": "diffusion_data.process_funcs.media_caption", "media_column": ["jpg", "mp4"]}
    with pytest.raises(UserError, match=r"process_func\.media_column: there is no column 'jpg'.*media, caption"):
        prepare(prepare_config(small(tmp_path, 1), tmp_path / "out", process_func=func))
    with pytest.raises(UserError, match=r"metadata_columns: there is no column 'aesthetic'"):
        prepare(prepare_config(small(tmp_path, 1), tmp_path / "out", metadata_columns=("aesthetic",)))
    assert not (tmp_path / "out").exists()


def test_a_process_func_that_cannot_be_called_is_an_error_that_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = small(tmp_path, 1)
    func = {"_target_": "diffusion_data.process_funcs.media_caption", "colour": "red"}
    with pytest.raises(UserError, match=r"process_func: .*unexpected keyword argument 'colour'"):
        prepare(prepare_config(source, tmp_path / "out", process_func=func))
    for target, said in {
        "no.such.func": "can't import no.such.func: No module named 'no'",
        "json.no_such": "can't import json.no_such: module 'json' has no attribute 'no_such'",
        "math.pi": "math.pi is no function",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"process_func._target_: {said}")):
            prepare(prepare_config(source, tmp_path / "out", process_func={"_target_": target}))
    assert not caplog.records  # the error is all that is told


def test_the_first_column_that_is_not_null_counts(tmp_path: Path) -> None:
    picture = {"bytes": picture_bytes(1), "path": None}
    rows = [
        {"video": None, "image": picture, "caption": "only an image"},
        {"video": picture, "image": None, "caption": "only a video"},
        {"video": None, "image": None, "caption": "nothing"},
    ]
    source = write_source(tmp_path / "source.parquet", rows)
    func = {"_target_": "diffusion_data.process_funcs.media_caption", "media_column": ["video", "image"]}
    totals = prepare(prepare_config(source, tmp_path / "out", process_func=func, metadata_columns=()))
    assert totals is not None
    assert (totals.written, totals.rejected) == (2, {"null_media": 1})


def test_long_captions_are_cut_and_counted(tmp_path: Path) -> None:
    totals = prepare(
        prepare_config(
            small(tmp_path, 5),
            tmp_path / "out",
            text_encoder=TextEncoderConfig(name="tiny-t5", max_length=5),
        )
    )
    assert totals is not None
    samples = read_samples(tmp_path / "out")
    assert max(len(sample.text_embedding) for sample in samples) == 5
    assert totals.captions_cut > 0
    assert samples[4].metadata["caption"] == "picture very very very very nice"


def test_a_dataset_that_cannot_be_read_back_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step opens what was written as training would; here the text embeddings have no tokens."""
    zeros = torch.zeros(512, 1024, dtype=torch.float16)
    monkeypatch.setattr(T5TextEncoder, "encode_tokens", lambda self, batch: [zeros[: len(ids)] for ids in batch])
    with pytest.raises(UserError, match="no_text"):
        prepare(prepare_config(small(tmp_path, 4), tmp_path / "out"))


def fetch_or_fail(row: dict[str, Any], *, media: MediaLoader, network: str) -> MediaSample:
    """A process function whose network is down as long as the file `network` doesn't exist."""
    if not Path(network).exists():
        raise RowRejected(Reason.fetch_error, "no network")
    return media_caption(row, media=media)


def test_what_an_outage_of_the_network_rejected_is_tried_again(tmp_path: Path) -> None:
    source, network = small(tmp_path), tmp_path / "network"
    func = {"_target_": f"{__name__}.fetch_or_fail", "network": str(network)}
    with pytest.raises(UserError, match=r"every row was rejected \(fetch_error 8\)"):
        prepare(prepare_config(source, tmp_path / "out", process_func=func))
    network.touch()
    totals = prepare(prepare_config(source, tmp_path / "out", process_func=func))
    assert totals is not None
    assert (totals.written, totals.rejected) == (8, {})


def test_ways_to_fetch_may_change_between_runs(tmp_path: Path) -> None:
    source = small(tmp_path, 4)
    prepare(prepare_config(source, tmp_path / "out"))
    other = MediaConfig(
        short_side=48,
        allowed_roots=("/elsewhere",),
        allowed_hosts=("a",),
        fetch_timeout_seconds=1.0,
        fetch_retries=0,
        max_redirects=0,
        max_connections_per_host=1,
        max_fetch_bytes=1,
    )
    prepare(prepare_config(source, tmp_path / "out", media=other, row_timeout_seconds=1.0, max_reject_rate=0.5))


def test_a_source_may_move_to_another_folder(tmp_path: Path) -> None:
    source = small(tmp_path, 4)
    prepare(prepare_config(source, tmp_path / "out"))
    (tmp_path / "elsewhere").mkdir()
    prepare(prepare_config(source.rename(tmp_path / "elsewhere" / source.name), tmp_path / "out"))


def test_a_changed_helper_in_the_users_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "pets_of_mine.py"
    text = """
from diffusion_data import MediaSample
def say(caption): return caption + " A"
def pet(row, *, media): return MediaSample(frames=media.load(row["media"]), caption=say(row["caption"]))
"""
    module.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    source, func = small(tmp_path, 4), {"_target_": "pets_of_mine.pet"}
    prepare(prepare_config(source, tmp_path / "out", process_func=func))
    module.write_text(text.replace(" A", " B"))
    with pytest.raises(UserError, match=r"process_func\.module_sha256"):
        prepare(prepare_config(source, tmp_path / "out", process_func=func))


def test_a_full_disk_ends_the_run_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small(tmp_path)
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "shard_000001.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"can't write shard_000001\.tar: .*No space left.*same command again"):
        prepare(prepare_config(source, tmp_path / "out"))
    monkeypatch.undo()
    prepare(prepare_config(source, tmp_path / "out"))
    prepare(prepare_config(source, tmp_path / "undisturbed"))
    assert tar_bytes(tmp_path / "out") == tar_bytes(tmp_path / "undisturbed")


def test_shards_of_an_unknown_run_are_refused(tmp_path: Path) -> None:
    source = small(tmp_path, 4)
    prepare(prepare_config(source, tmp_path / "out"))
    (tmp_path / "out/run/fingerprint.json").unlink()
    with pytest.raises(UserError, match=r"has a ledger but no fingerprint\.json"):
        prepare(prepare_config(source, tmp_path / "out"))
    (tmp_path / "out/run/fingerprint.json").write_text("{")
    with pytest.raises(UserError, match=r"fingerprint\.json is damaged"):
        prepare(prepare_config(source, tmp_path / "out"))


def test_the_options_file_lists_every_option_with_its_default() -> None:
    """Options that are not in configs/prepare.yaml can't be set on the command line."""
    listed = yaml.safe_load((Path(__file__).parent.parent / "configs/prepare.yaml").read_text())
    for group, kind in [("media", MediaConfig), ("batching", BatchingConfig)]:
        defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(kind()).items()}
        assert listed[group] == defaults
    for group, kind in [("tokenizer", TokenizerConfig), ("text_encoder", TextEncoderConfig)]:
        assert set(listed[group]) == {each.name for each in fields(kind)}
    assert set(listed) - {"defaults", "hydra"} == {each.name for each in fields(PrepareConfig)}


def test_threads_and_workers_change_no_byte_and_halved_batches_are_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(12))
    prepare(prepare_config(source, tmp_path / "in_line"))
    prepare(prepare_config(source, tmp_path / "threads", num_workers=2, encode_threads=3))
    assert tar_bytes(tmp_path / "threads") == tar_bytes(tmp_path / "in_line")

    original = CosmosTokenizer.encode

    def one_at_a_time(self: CosmosTokenizer, frames: torch.Tensor) -> torch.Tensor:
        if len(frames) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, frames)

    monkeypatch.setattr(CosmosTokenizer, "encode", one_at_a_time)
    prepare(prepare_config(source, tmp_path / "halved"))
    entry = json.loads((tmp_path / "halved/run/ledger/shard_000000.json").read_text())
    assert entry["batches_halved"] == ["2 frames"]
    assert json.loads((tmp_path / "halved/run/stats.json").read_text())["batches_halved"] >= 3
