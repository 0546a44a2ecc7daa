"""EncodedShard -> `shard_000000.tar`, whole and durable, then its ledger entry.

Equal samples give equal bytes: members carry no time, owner or other trace of the run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from webdataset import TarWriter

from diffusion_data.dataset_stats import DatasetStats
from diffusion_data.decoded_row import RejectedRow
from diffusion_data.durable_file import durable_file, remove_file
from diffusion_data.encode_pipeline import EncodedShard
from diffusion_data.ledger import Ledger, LedgerEntry


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
        written = num_samples = 0
        encoded.wait()
        times = encoded.record.times
        # An earlier entry could be taken for one of the new tar. Until the rename it is of the old one, which may stay.
        strike_off = partial(self._ledger.remove, shard)
        with times.busy("write"), durable_file(final, before_rename=strike_off) as file:
            with TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as tar:
                for row in encoded.rows():
                    if isinstance(row, RejectedRow):
                        rejected.append(row)
                        continue
                    stats.add_left_out(row.left_out)
                    for sample in row.samples:
                        tar.write({"__key__": sample.key, **sample.to_parts()})
                        stats.add(sample)
                    written += 1
                    num_samples += len(row.samples)
            gains = before is None or {row.row for row in rejected} < before.rejected_rows
            if not gains or not written:
                file.discard()
        if before is not None and not gains:
            return before
        if not written:
            strike_off()
            remove_file(final)  # of an earlier try, in which a row could still be fetched
        entry = LedgerEntry(
            shard=shard.number,
            start=shard.start,
            stop=shard.stop,
            file=shard.file_name if written else None,
            num_bytes=file.num_bytes if written else 0,
            sha256=file.sha256 if written else None,
            written=written,
            samples=num_samples,
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
