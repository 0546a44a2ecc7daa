"""A tar shard -> what is wrong with it, sample by sample. It goes on after a fault, where a reader would stop."""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_data.latent_sample import LATENT_PART, PARTS, TEXT_PART, LatentSample, all_finite, sample_key
from diffusion_data.safe_decoder import decode_part

_END_OF_TAR = 1024  # bytes at least, all zero
_KEY_BYTES = 16


@dataclass(kw_only=True)
class ShardFindings:
    """What a shard holds. Whatever is wrong is a line in `faults`, naming the key where there is one.

    offsets: where each sample begins in the tar and where the last one ends, as energon's index has them
    key_digests: uint64 (samples, 2)
    latent_shapes: samples of each shape "CxTxHxW"
    kinds: (channels of the latent, width of the text embedding) -> key of the first sample that has them
    """

    num_samples: int = 0
    faults: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    key_digests: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    latent_shapes: Counter[str] = field(default_factory=Counter)
    kinds: dict[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True)
class _RawSample:
    key: str
    offset: int
    parts: dict[str, bytes]


def check_shard(path: Path, rows: range | None = None) -> ShardFindings:
    """Read all of a shard.

    rows: those that it was made of, if this package made it; its samples must then be exactly as written

    Raises:
        OSError: the file can't be read.
    """
    findings = ShardFindings()
    digests: list[bytes] = []
    seen: set[str] = set()
    last_row = -1
    for sample in _raw_samples(path, findings):
        findings.num_samples += 1
        findings.offsets.append(sample.offset)
        digests.append(hashlib.blake2b(sample.key.encode("utf-8", "surrogateescape"), digest_size=_KEY_BYTES).digest())
        if sample.key in seen:
            findings.faults.append(f"{sample.key}: a second sample with this key")
        seen.add(sample.key)
        if rows is not None:
            row = _row_of(sample.key)
            if row is None or row not in rows:
                findings.faults.append(f"{sample.key}: none of the shard's rows [{rows.start}, {rows.stop})")
            elif row <= last_row:
                findings.faults.append(f"{sample.key}: comes after row {last_row}")
            last_row = last_row if row is None else max(row, last_row)
        findings.faults += [f"{sample.key}: {fault}" for fault in _check_sample(sample, findings, rows is not None)]
    findings.key_digests = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return findings


def keys_of(path: Path) -> list[str]:
    """The keys of a shard, in order."""
    return [sample.key for sample in _raw_samples(path, ShardFindings(), with_contents=False)]


def _raw_samples(path: Path, findings: ShardFindings, with_contents: bool = True) -> Iterator[_RawSample]:
    """Group the members by key; what is no plain file is a fault. Ends with the check of the tar's end."""
    sample: _RawSample | None = None
    num_bytes = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.issparse():
                    findings.faults.append(f"{member.name}: no plain file")
                    continue
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    findings.faults.append(f"{member.name}: the name leads out of the shard")
                    continue
                key, part = _split_name(member.name)
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = _RawSample(key, member.offset, {})
                if part in sample.parts:
                    findings.faults.append(f"{key}: two parts {part!r}")
                if member.offset_data + member.size > num_bytes:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                file = tar.extractfile(member) if with_contents else None
                sample.parts[part] = file.read() if file is not None else b""
            if sample is not None:
                yield sample
            findings.offsets.append(tar.offset)
            end = _end_fault(path, tar.offset)
    except tarfile.TarError as error:
        place = f"after {sample.key}" if sample is not None else "from its start"
        findings.faults.append(f"damaged {place}: {error}")
        return
    if end is not None:
        findings.faults.append(end)


def _end_fault(path: Path, offset: int) -> str | None:
    """tarfile takes a damaged header for the end, and a tar that is cut between members for whole."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = 0
        while chunk := file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                return f"damaged at byte {offset}: neither a member nor the end of a tar"
            rest += len(chunk)
    return None if rest >= _END_OF_TAR else f"cut off at byte {offset}: a tar ends with {_END_OF_TAR} zero bytes"


def _split_name(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, part = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, part


def _row_of(key: str) -> int | None:
    digits = key.rpartition("_")[2]
    row = int(digits) if digits.isascii() and digits.isdigit() else -1
    return row if row >= 0 and sample_key(row) == key else None


def _check_sample(raw: _RawSample, findings: ShardFindings, is_ours: bool) -> list[str]:
    try:
        decoded = {part: decode_part(part, content) for part, content in raw.parts.items()}
        sample = LatentSample.from_parts(raw.key, decoded)
    except ValueError as error:
        return [str(error).removeprefix(f"{raw.key}: ")]
    faults = []
    if not all_finite(sample.latent):
        faults.append("the latent holds NaN or infinity")
    if not all_finite(sample.text_embedding):
        faults.append("the text embedding holds NaN or infinity")
    if not len(sample.text_embedding) or not sample.latent.numel():
        faults.append("the latent or the text embedding is empty")
    if is_ours:
        faults += _contract_faults(sample, decoded)
    findings.latent_shapes["x".join(map(str, sample.latent.shape))] += 1
    findings.kinds.setdefault((sample.latent.shape[0], sample.text_embedding.shape[1]), raw.key)
    return faults


def _contract_faults(sample: LatentSample, decoded: Mapping[str, Any]) -> list[str]:
    """What a reader makes the best of, but no writer of this package writes."""
    faults = []
    if set(decoded) != set(PARTS):
        return [f"its parts are {', '.join(decoded)}, expected {', '.join(PARTS)}"]
    latent, text = decoded[LATENT_PART], decoded[TEXT_PART]
    if not isinstance(latent, torch.Tensor) or latent.dtype != torch.bfloat16 or latent.shape != sample.latent.shape:
        faults.append("the latent is no bfloat16 tensor (C, T, H, W)")
    if not isinstance(text, np.ndarray) or text.dtype != np.float16 or text.shape != sample.text_embedding.shape:
        faults.append("the text embedding is no float16 array (S, D) of real tokens")
    metadata = sample.metadata
    if metadata.get("num_text_tokens") != len(sample.text_embedding):
        faults.append(f"num_text_tokens is {metadata.get('num_text_tokens')}, of {len(sample.text_embedding)}")
    _, frames, height, width = sample.latent.shape
    high, wide = metadata.get("height"), metadata.get("width")
    if not isinstance(high, int) or not isinstance(wide, int) or high * width != wide * height:
        faults.append(f"a latent of {height} x {width} can't be of {high} x {wide} pixels")
    if (frames == 1) != (metadata.get("num_frames") == 1):
        faults.append(f"{frames} latent frames can't be of {metadata.get('num_frames')} frames")
    return faults
