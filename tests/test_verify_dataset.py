"""Each kind of damage to a finished dataset is a line that names it; a whole one is a line that says so."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from diffusion_data.energon_metadata import write_energon_metadata
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.scripts.verify_dataset import main
from diffusion_data.verify_dataset import verify_dataset
from tests.small_source import prepare_config, source_rows, write_source
from tests.tiny_dataset import tiny_sample, write_dataset, write_raw_dataset


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows, one of them rejected, in three shards."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = source_rows(10)
    rows[5]["caption"] = None
    write_source(folder / "source.parquet", rows)
    prepare(prepare_config(folder / "source.parquet", folder / "dataset"))
    return folder / "dataset"


@pytest.fixture
def dataset(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "dataset")


def faults(dataset: Path) -> list[str]:
    return verify_dataset(dataset, num_workers=1).faults


def test_a_whole_dataset_has_no_fault_and_is_summed_up(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(prepared), "--workers", "2"])
    told = capsys.readouterr().out
    assert told.startswith(f"{prepared}: 3 shards, 9 samples; 10 rows = 9 written + 1 rejected; no fault, ")
    assert told.count("\n") == 1


def test_faults_are_lines_and_the_exit_code_tells(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (dataset / "shard_000001.tar").unlink()
    with pytest.raises(SystemExit) as ended:
        main([str(dataset), "--workers", "1"])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "shard_000001.tar: missing\n" in told.out
    assert f"faults in {dataset}: 2 shards" in told.err
    with pytest.raises(SystemExit) as ended:
        main([str(dataset / "nothing")])
    assert ended.value.code == 2


def test_nothing_is_written(dataset: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    faults(dataset)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def edit_text(path: Path, before: str, after: str) -> None:
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped byte": (lambda d: flip(d / "shard_000000.tar", 9000), "shard_000000.tar: other bytes than were written"),
    "a cut tar": (lambda d: cut(d / "shard_000000.tar", 20_000), "shard_000000.tar: 20000 bytes, "),
    "an empty tar": (lambda d: cut(d / "shard_000000.tar", 0), "shard_000000.tar: damaged from its start"),
    "a linked tar": (lambda d: link(d / "shard_000000.tar"), "shard_000000.tar: not a plain file"),
    "a foreign tar": (
        lambda d: shutil.copy(d / "shard_000000.tar", d / "shard_000007.tar"),
        "shard_000007.tar: not in the ledger",
    ),
    "an altered entry": (
        lambda d: edit_json(d / "run/ledger/shard_000001.json", captions_cut=1),
        "run/ledger/shard_000001.json: was altered",
    ),
    "a torn entry": (lambda d: cut(d / "run/ledger/shard_000001.json", 40), "run/ledger/shard_000001.json: is torn"),
    "a missing entry": (
        lambda d: (d / "run/ledger/shard_000001.json").unlink(),
        "run/ledger/shard_000002.json: begins at row 8, expected row 4",
    ),
    "a missing last entry": (
        lambda d: (d / "run/ledger/shard_000002.json").unlink(),
        "run/ledger: ends at row 8 of the source's 10",
    ),
    "another run's settings": (
        lambda d: edit_json(d / "run/fingerprint.json", device="tpu"),
        "run/ledger/shard_000000.json: of a run with other settings",
    ),
    "a rejected row lost": (
        lambda d: (d / "run/rejected.jsonl").write_text(""),
        "run/rejected.jsonl: row 5 is missing or altered",
    ),
    "a rejected row doubled": (
        lambda d: (d / "run/rejected.jsonl").write_text(2 * (d / "run/rejected.jsonl").read_text()),
        "run/rejected.jsonl: more rows than the ledger rejected",
    ),
    "altered statistics": (
        lambda d: edit_json(d / "run/stats.json", written=10),
        "run/stats.json: written is 10, the ledger has 9",
    ),
    "other shapes": (
        lambda d: edit_json(d / "run/stats.json", latent_shapes=[[16, 1, 6, 8, 9]]),
        "run/stats.json: latent_shapes are not those of the shards",
    ),
    "a shard in two splits": (
        lambda d: edit_text(d / ".nv-meta/split.yaml", "val: []", "val: [shard_000000.tar]"),
        ".nv-meta/split.yaml: shard_000000.tar is in 2 splits",
    ),
    "a shard in no split": (
        lambda d: edit_text(d / ".nv-meta/split.yaml", "  - shard_000002.tar\n", ""),
        "shard_000002.tar: in no split",
    ),
    "another count": (
        lambda d: edit_text(d / ".nv-meta/.info.json", '"shard_000001.tar": 3', '"shard_000001.tar": 4'),
        "shard_000001.tar: 3 samples, .nv-meta says 4",
    ),
    "an index that leads elsewhere": (
        lambda d: flip(d / "shard_000001.tar.idx", 9),
        "shard_000001.tar.idx: doesn't lead to the shard's samples",
    ),
    "no index": (lambda d: (d / "shard_000001.tar.idx").unlink(), "shard_000001.tar.idx: missing"),
    "an altered index of energon's": (
        lambda d: flip(d / ".nv-meta/index.sqlite", 5000),
        ".nv-meta/index.sqlite: other bytes than were written",
    ),
    "something planted": (
        lambda d: (d / ".nv-meta/part_filter.py").write_text(""),
        ".nv-meta/part_filter.py: not of this dataset's metadata",
    ),
    "no dataset.yaml": (lambda d: (d / ".nv-meta/dataset.yaml").unlink(), ".nv-meta: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(dataset: Path, damage: str) -> None:
    do, told = DAMAGES[damage]
    do(dataset)
    found = faults(dataset)
    assert any(fault.startswith(told) for fault in found), found


def as_written_by_a_faulty_writer(dataset: Path, change: Callable[[dict[str, dict[str, bytes]]], object]) -> list[str]:
    """Rewrite the second shard with other samples, and everything else to match, as if it had been written so."""
    tar = dataset / "shard_000001.tar"
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as old:
        for member in old:
            key, _, part = member.name.partition(".")
            samples.setdefault(key, {})[part] = old.extractfile(member).read()  # type: ignore[union-attr]
    change(samples)
    with webdataset.TarWriter(str(tar), encoder=False, mtime=0) as new:
        for key, parts in samples.items():
            new.write({"__key__": key, **parts})
    return [fault for fault in faults(dataset) if fault.startswith("shard_000001.tar: ") and "bytes" not in fault]


def saved(value: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


KEY = "samples/sample_000000006"
NAN = torch.full((16, 1, 6, 8), float("nan"), dtype=torch.bfloat16)
WRITTEN: dict[str, tuple[Callable[[dict[str, dict[str, bytes]]], object], str]] = {
    "no text": (lambda s: s[KEY].pop("pickle"), f"{KEY}: no part 'pickle', only ['json', 'pth']"),
    "not finite": (lambda s: s[KEY].update(pth=saved(NAN)), f"{KEY}: the latent holds NaN or infinity"),
    "a batch axis": (
        lambda s: s[KEY].update(pth=saved(torch.ones(1, 16, 1, 6, 8, dtype=torch.bfloat16))),
        f"{KEY}: the latent is no bfloat16 tensor (C, T, H, W)",
    ),
    "float32": (
        lambda s: s[KEY].update(pth=saved(torch.ones(16, 1, 6, 8))),
        f"{KEY}: the latent is no bfloat16 tensor (C, T, H, W)",
    ),
    "another height": (
        lambda s: s[KEY].update(pth=saved(torch.ones(16, 1, 12, 8, dtype=torch.bfloat16))),
        f"{KEY}: a latent of 12 x 8 can't be of 48 x 48 pixels",
    ),
    "no tensor": (lambda s: s[KEY].update(pth=b"rubbish"), f"{KEY}: part 'pth' is refused"),
    "another row's key": (
        lambda s: s.update({"samples/sample_000000001": s.pop(KEY)}),
        "samples/sample_000000001: none of the shard's rows [4, 8)",
    ),
    "a key that is no row's": (lambda s: s.update({"cat": s.pop(KEY)}), "cat: none of the shard's rows [4, 8)"),
    "another order": (lambda s: s.update({KEY: s.pop(KEY)}), f"{KEY}: comes after row 7"),
    "one channel": (
        lambda s: s[KEY].update(pth=saved(torch.ones(1, 1, 6, 6, dtype=torch.bfloat16))),
        f"{KEY}: 1 channels and texts 1024 wide, elsewhere 16 and 1024",
    ),
    "one part more": (lambda s: s[KEY].update(txt=b"x"), f"{KEY}: its parts are"),
    "too few": (lambda s: s.pop(KEY), "2 samples, 3 were written"),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_samples_that_should_not_have_been_written_are_named(dataset: Path, what: str) -> None:
    change, told = WRITTEN[what]
    found = as_written_by_a_faulty_writer(dataset, change)
    assert any(fault.startswith(f"shard_000001.tar: {told}") for fault in found), found


def test_a_tar_cut_between_samples_or_without_its_end_is_damaged(dataset: Path) -> None:
    tar = dataset / "shard_000000.tar"
    index = np.frombuffer((dataset / "shard_000000.tar.idx").read_bytes(), "<u8")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: index[-1]])  # after the last sample: tarfile takes it for whole
    assert any(fault.startswith(f"shard_000000.tar: cut off at byte {index[-1]}") for fault in faults(dataset))
    tar.write_bytes(whole[: index[1]] + b"x" + whole[index[1] + 1 :])  # a header, for which tarfile ends
    assert any(fault.startswith(f"shard_000000.tar: damaged at byte {index[1]}") for fault in faults(dataset))


def test_members_that_are_no_plain_files_are_told(dataset: Path) -> None:
    with tarfile.open(dataset / "shard_000000.tar", "a") as tar:
        member = tarfile.TarInfo("samples/sample_000000003.pth")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("../../escape.pth"))
    found = faults(dataset)
    assert "shard_000000.tar: samples/sample_000000003.pth: no plain file" in found
    assert "shard_000000.tar: ../../escape.pth: the name leads out of the shard" in found


def test_a_dataset_made_elsewhere_is_checked_without_a_ledger(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", [tiny_sample(row) for row in range(6)])
    verdict = verify_dataset(dataset, num_workers=1)
    assert verdict.faults == []
    assert verdict.summary == (
        f"{dataset}: 2 shards, 6 samples; it has no ledger: no checksums, and no rows to account for"
    )


def test_a_key_in_two_shards_is_named(tmp_path: Path) -> None:
    """energon's own preparation refuses these, so the second shard changes after it."""
    samples = {sample.key: sample.to_parts() for sample in map(tiny_sample, range(8))}
    dataset = write_raw_dataset(tmp_path / "dataset", samples)
    with webdataset.TarWriter(str(dataset / "shard_000001.tar"), mtime=0, encoder=False) as tar:
        for row in (4, 5, 2, 7):
            tar.write({"__key__": tiny_sample(row).key, **tiny_sample(row).to_parts()})
    assert faults(dataset) == ["shard_000001.tar: samples/sample_000000002: also in shard_000000.tar"]


def test_a_key_twice_in_a_shard_is_named(tmp_path: Path) -> None:
    samples = {sample.key: sample.to_parts() for sample in map(tiny_sample, range(4))}
    dataset = write_raw_dataset(tmp_path / "dataset", samples)
    with webdataset.TarWriter(str(dataset / "shard_000000.tar"), mtime=0, encoder=False) as tar:
        for row in (0, 1, 0, 3):
            tar.write({"__key__": tiny_sample(row).key, **tiny_sample(row).to_parts()})
    assert faults(dataset) == ["shard_000000.tar: samples/sample_000000000: a second sample with this key"]


def test_after_another_split_of_the_same_shards_all_is_well(dataset: Path) -> None:
    """By hand, without the job: then only the record of the metadata is out of date."""
    write_energon_metadata(dataset, sorted(path.name for path in dataset.glob("*.tar")), (1, 1, 0), seed=0)
    assert faults(dataset) == ["run/metadata.json: missing, or of other shards; run the job again, which makes it"]
    assert not os.path.lexists(dataset / "run/metadata.json")
