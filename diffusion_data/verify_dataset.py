"""A finished dataset -> what is wrong with it, a line each: every byte is read, in parallel, nothing is written.

    ledger             entries unaltered, of one run, rows contiguous, rows = written + rejected, all of the source's
    shards             checksum, complete samples in the ledger's rows, shapes, dtypes, finite values, no key twice
    beside the shards  .nv-meta and run/ tell of exactly these shards and samples

A dataset without a ledger, made elsewhere, is checked against its `.nv-meta` alone.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from diffusion_data.counted import counted
from diffusion_data.distributed import usable_cpus
from diffusion_data.durable_file import read_plain_file, sha256_of_file, size_of_plain_file
from diffusion_data.energon_metadata import metadata_faults
from diffusion_data.errors import UserError
from diffusion_data.ledger import LedgerEntry
from diffusion_data.process_server import process_context, start_process_server
from diffusion_data.run_check import check_ledger, rejected_faults, stats_faults

if TYPE_CHECKING:
    from diffusion_data.shard_check import ShardFindings


@dataclass(kw_only=True)
class Verdict:
    """faults: a line each, beginning with the file's name; empty if all is well.

    summary: what was looked at, in a line
    """

    faults: list[str] = field(default_factory=list)
    summary: str = ""


def verify_dataset(dataset: Path, num_workers: int | None = None) -> Verdict:
    """Check everything about `dataset`.

    num_workers: processes; None is one a processor

    Raises:
        UserError: there is no dataset at all.
    """
    start_process_server()
    if not dataset.is_dir():
        raise UserError(f"{dataset} is no folder; give the folder of a dataset")
    verdict = Verdict()
    listed = _listed_shards(dataset, verdict)
    entries = check_ledger(dataset, verdict.faults)
    if not entries and not listed:
        raise UserError(f"{dataset} holds no dataset that could be checked: {'; '.join(verdict.faults)}")
    written = {entry.file: entry for entry in entries if entry.file is not None}
    files = {*listed, *written, *(path.name for path in dataset.glob("shard_*.tar"))} if entries else listed
    findings = _check_shards(dataset, {file: written.get(file) for file in sorted(files)}, num_workers, verdict)
    if entries:
        _compare_with_ledger(dataset, entries, listed, findings, verdict)
    for file, count in listed.items():
        if file in findings and findings[file].num_samples != count:
            verdict.faults.append(f"{file}: {findings[file].num_samples} samples, .nv-meta says {count}")
    _compare_indices(dataset, findings, verdict)
    _compare_kinds(findings, verdict)
    _find_duplicate_keys(dataset, findings, verdict)
    verdict.summary = _summary(dataset, entries, findings)
    return verdict


def _listed_shards(dataset: Path, verdict: Verdict) -> dict[str, int]:
    """Shards that the splits name, and their samples as energon counted them."""
    from diffusion_data.dataset_folder import check_dataset

    try:
        splits = check_dataset(dataset).shards
    except UserError as error:
        verdict.faults.append(f".nv-meta: {error}")
        return {}
    times_named = Counter(file for shards in splits.values() for file in shards)
    verdict.faults += [f".nv-meta/split.yaml: {file} is in {n} splits" for file, n in times_named.items() if n > 1]
    return {file: count for shards in splits.values() for file, count in shards.items()}


def _check_shards(
    dataset: Path, files: Mapping[str, LedgerEntry | None], num_workers: int | None, verdict: Verdict
) -> dict[str, ShardFindings]:
    """What each shard holds; those that can't be read at all are left out."""
    findings = {}
    workers = min(num_workers or usable_cpus(), max(1, len(files)))
    try:
        with ProcessPoolExecutor(workers, mp_context=process_context(), initializer=_one_thread) as pool:
            checks = pool.map(_check_file, [dataset / file for file in files], files.values())
            shown = tqdm(checks, total=len(files), unit="shard", disable=None, file=sys.stderr)
            for file, found in zip(files, shown, strict=True):
                if isinstance(found, str):
                    verdict.faults.append(f"{file}: {found}")
                    continue
                findings[file] = found
                verdict.faults += [f"{file}: {fault}" for fault in found.faults]
    except BrokenProcessPool as error:
        raise UserError("a process that checks was killed, maybe for memory; try fewer with --workers") from error
    return findings


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _check_file(path: Path, entry: LedgerEntry | None) -> ShardFindings | str:
    """Runs in a process of its own."""
    from diffusion_data.shard_check import check_shard

    size = size_of_plain_file(path)
    is_linked = entry is None and path.is_file()  # made elsewhere, by someone who may have had reasons
    if size is None and not is_linked:
        return "not a plain file" if os.path.lexists(path) else "missing"
    try:
        found = check_shard(path, None if entry is None else range(entry.start, entry.stop))
        if entry is not None and size != entry.num_bytes:
            found.faults.append(f"{size} bytes, {entry.num_bytes} were written")
        elif entry is not None and sha256_of_file(path) != entry.sha256:
            found.faults.append("other bytes than were written")
    except OSError as error:
        return f"can't be read: {error}"
    if entry is not None and found.num_samples != entry.samples:
        found.faults.append(f"{found.num_samples} samples, {entry.samples} were written")
    if entry is not None and found.num_rows != entry.written:
        found.faults.append(f"samples of {found.num_rows} rows, {entry.written} rows were written")
    return found


def _compare_with_ledger(
    dataset: Path,
    entries: Sequence[LedgerEntry],
    listed: Mapping[str, int],
    findings: Mapping[str, ShardFindings],
    verdict: Verdict,
) -> None:
    written = {entry.file: entry for entry in entries if entry.file is not None}
    for file in sorted({*listed, *findings} - set(written)):
        verdict.faults.append(f"{file}: not in the ledger")
    for file in sorted(set(written) - set(listed)) if listed else ():
        verdict.faults.append(f"{file}: in no split")
    digests = {file: entry.sha256 for file, entry in written.items() if entry.sha256 is not None}
    faults = metadata_faults(dataset, digests, full=True)
    if faults is None:
        faults = ["run/metadata.json: missing, or of other shards; run the job again, which makes it"]
    verdict.faults += faults
    verdict.faults += rejected_faults(dataset, entries)
    shapes: Counter[str] = sum((found.latent_shapes for found in findings.values()), Counter())
    verdict.faults += stats_faults(dataset, entries, shapes)


def _compare_indices(dataset: Path, findings: Mapping[str, ShardFindings], verdict: Verdict) -> None:
    """energon finds samples by these, and would not notice that they lead elsewhere."""
    for file, found in findings.items():
        try:
            index = read_plain_file(dataset / f"{file}.idx")
        except FileNotFoundError:
            verdict.faults.append(f"{file}.idx: missing")
            continue
        except OSError as error:
            verdict.faults.append(f"{file}.idx: can't be read: {error}")
            continue
        if index != np.array(found.offsets, "<u8").tobytes():
            verdict.faults.append(f"{file}.idx: doesn't lead to the shard's samples")


def _compare_kinds(findings: Mapping[str, ShardFindings], verdict: Verdict) -> None:
    """Samples that differ in channels or text width can't be batched: the odd ones out are named."""
    shards_with = Counter(kind for found in findings.values() for kind in found.kinds)
    if len(shards_with) < 2:
        return
    usual = shards_with.most_common(1)[0][0]
    for file, found in findings.items():
        for (channels, width), key in found.kinds.items():
            if (channels, width) != usual:
                verdict.faults.append(
                    f"{file}: {key}: {channels} channels and texts {width} wide, elsewhere {usual[0]} and {usual[1]}"
                )


def _find_duplicate_keys(dataset: Path, findings: Mapping[str, ShardFindings], verdict: Verdict) -> None:
    """Across shards; within one they were found already."""
    from diffusion_data.shard_check import keys_of

    files = [file for file, found in findings.items() if len(found.key_digests)]
    if not files:
        return
    digests = np.concatenate([findings[file].key_digests for file in files])
    owners = np.repeat(np.arange(len(files)), [len(findings[file].key_digests) for file in files])
    order = np.lexsort((owners, digests[:, 1], digests[:, 0]))
    digests, owners = digests[order], owners[order]
    same = (digests[1:] == digests[:-1]).all(1) & (owners[1:] != owners[:-1])
    for first, second in sorted(set(zip(owners[:-1][same].tolist(), owners[1:][same].tolist(), strict=True))):
        common = sorted(set(keys_of(dataset / files[first])) & set(keys_of(dataset / files[second])))
        verdict.faults += [f"{files[second]}: {key}: also in {files[first]}" for key in common]


def _summary(dataset: Path, entries: Sequence[LedgerEntry], findings: Mapping[str, ShardFindings]) -> str:
    samples = sum(found.num_samples for found in findings.values())
    held = f"{dataset}: {counted(len(findings), 'shard')}, {counted(samples, 'sample')}"
    if not entries:
        return f"{held}; it has no ledger: no checksums, and no rows to account for"
    written = sum(entry.written for entry in entries)
    rejected = sum(len(entry.rejected) for entry in entries)
    return f"{held}; {written + rejected} rows = {written} written + {rejected} rejected"
