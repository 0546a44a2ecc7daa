"""EncodedShard -> `shard_000000.tar`, whole and durable, then its ledger entry.

Equal samples give equal bytes: members carry no time, owner or other trace of the run.
"""

from __future__ import annotations

from pathlib import Path

from webdataset import TarWriter

from diffusion_data.dataset_stats import DatasetStats
from diffusion_data.durable_file import durable_file, remove_file
from diffusion_data.encode_pipeline import EncodedShard
from diffusion_data.ledger import Ledger, LedgerEntry
from diffusion_data.row_decoder import RejectedRow


class ShardWriter:
    """Writes shards into `output_dir` and enters them in the run's ledger."""

    def __init__(self, output_dir: Path, ledger: Ledger) -> None:
        self._output_dir = output_dir
        self._ledger = ledger

    def write(self, encoded: EncodedShard, before: LedgerEntry | None = None) -> LedgerEntry:
        """Write the samples in row order. A shard without a sample gets a ledger entry but no tar.

        before: of the same shard, made earlier; it stays, with its tar, unless only rows are gained
        """
        shard = encoded.shard
        final = self._output_dir / shard.file_name
        stats = DatasetStats()
        rejected: list[RejectedRow] = []
        written = 0
        encoded.wait()
        times = encoded.record.times
        try:
            with times.busy("write"), durable_file(final) as file:
                with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
                    for sample in encoded.samples():
                        if isinstance(sample, RejectedRow):
                            rejected.append(sample)
                            continue
                        tar.write({"__key__": sample.key, **sample.to_parts()})
                        stats.add(sample)
                        written += 1
                if before is not None and not {row.row for row in rejected} < before.rejected_rows:
                    raise _NothingGained
                if not written:
                    raise _NothingToWrite
                self._ledger.remove(shard)  # an earlier entry could be taken for one of the new tar
        except _NothingGained:
            assert before is not None
            return before
        except _NothingToWrite:
            self._ledger.remove(shard)
            remove_file(final)  # of an earlier try, in which a row could still be fetched
        entry = LedgerEntry(
            shard=shard.number,
            start=shard.start,
            stop=shard.stop,
            file=shard.file_name if written else None,
            num_bytes=file.num_bytes if written else 0,
            sha256=file.sha256 if written else None,
            written=written,
            captions_cut=encoded.captions_cut,
            fingerprint=self._ledger.fingerprint,
            rejected=[row.to_json() for row in rejected],
            stats=stats.to_json(),
            batches_halved=encoded.record.halved,
            stage_seconds=times.seconds(),
            stage_cpu_seconds=times.cpu_seconds(),
        )
        self._ledger.write(entry)
        return entry


class _NothingToWrite(Exception):
    """Leaves `durable_file` without a file."""


class _NothingGained(Exception):
    """As _NothingToWrite; what is there stays."""
