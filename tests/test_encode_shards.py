"""The loop of a rank: what it leaves for the others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from diffusion_data.distributed import Ranks
from diffusion_data.encode_pipeline import _ShardEncoding
from diffusion_data.prepare_energon_dataset import prepare
from tests.small_source import prepare_config, source_rows, write_source


def test_a_shard_is_claimed_when_the_one_before_is_nearly_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker: two rows in stock are enough, of which one is the last row of the shard before."""
    encoded = 0
    at_claim: list[int] = []
    claim, add = Ranks.claim, _ShardEncoding.add

    def noted_claim(self: Ranks, counter: str) -> int:
        if counter == "shards_claimed":
            at_claim.append(encoded)
        return claim(self, counter)

    def noted_add(self: _ShardEncoding, result: Any) -> None:
        nonlocal encoded
        encoded += 1
        add(self, result)

    monkeypatch.setattr(Ranks, "claim", noted_claim)
    monkeypatch.setattr(_ShardEncoding, "add", noted_add)
    source = write_source(tmp_path / "rows.parquet", source_rows(12))
    prepare(prepare_config(source, tmp_path / "out", num_workers=1))
    assert encoded == 12
    assert len(at_claim) == 4  # three shards of four rows, and to find that there is no other
    assert all(4 * number - 1 <= rows <= 4 * number for number, rows in enumerate(at_claim) if number)
    assert at_claim[0] == 0


@pytest.mark.parametrize("encode_threads", [0, 2])
def test_at_the_end_all_rows_are_shown_as_done(
    encode_threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = source_rows(10)
    rows[2]["caption"] = None
    source = write_source(tmp_path / "rows.parquet", rows)
    capsys.readouterr()
    prepare(prepare_config(source, tmp_path / "out", encode_threads=encode_threads, max_reject_rate=1.0))
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"10/10 rows, \d+\.\d samples/s, 0:00:00 left, 1 rejected; busy: ", last)
