"""Rows that the network failed, tried again: which of the finished shards can gain some now?

Only these rows are decoded. A shard that can gain is then made anew as a whole, for batches are formed within it; its
writer keeps the old one if a row is lost on the way (see `ShardWriter.write`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from diffusion_data.decode_workers import DecodeWorkers
from diffusion_data.decoded_row import DecodedRow
from diffusion_data.distributed import Ranks
from diffusion_data.ledger import Ledger
from diffusion_data.shard_plan import Shard
from diffusion_data.sources import ParquetSource, Row


def shards_that_gain(
    ranks: Ranks,
    retry: Sequence[Shard],
    ledger: Ledger,
    source: ParquetSource,
    workers: DecodeWorkers,
    before_any_changes: Callable[[], object],
) -> set[int]:
    """Numbers of the shards of `retry` of which a rejected row can be had now, on every rank the same.

    The ranks share the rows, which count neither as done nor as rejected.

    before_any_changes: called on rank 0, if there are such shards, before any rank is told which
    """
    gaining: set[int] = set()

    def rows(shard: Shard) -> Iterator[tuple[Shard, Row]]:
        entry = ledger.read(shard)
        for index in entry.retryable if entry is not None else ():
            if shard.number in gaining:
                break
            for row in source.read_rows(index, index + 1):
                yield shard, row

    for shard, result in workers.map_groups(map(rows, ranks.claimed(retry, "retries_claimed"))):
        if isinstance(result, DecodedRow):
            gaining.add(shard.number)
    if ranks.rank == 0:
        for rank in range(1, ranks.world_size):
            gaining.update(ranks.receive(f"gaining/{rank}", publisher=rank))
        if gaining:
            before_any_changes()
        ranks.publish("gaining", sorted(gaining))
        return gaining
    ranks.publish(f"gaining/{ranks.rank}", sorted(gaining))
    return set(ranks.receive("gaining"))
