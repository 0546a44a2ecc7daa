"""A stored sample -> the frames that it was encoded from, by decoding its source row once more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_data.row_decoder import DecodedRow, RowDecoder
from diffusion_data.sources import ParquetSource


class SourceFrames:
    """The rows of one source, decoded as the job decodes them."""

    def __init__(self, source: ParquetSource, decoder: RowDecoder) -> None:
        self._source = source
        self._decoder = decoder
        self._first_rows: dict[str, int] = {}
        first = 0
        for file in source.files:
            self._first_rows[file.name] = first
            first += file.num_rows

    def frames_of(self, metadata: Mapping[str, Any]) -> np.ndarray | None:
        """uint8 (T, H, W, 3) of the sample with that json; None if its row doesn't give such frames now.

        Raises:
            UserError: the source can't be read any more.
        """
        first, row = self._first_rows.get(metadata.get("source_file", "")), metadata.get("source_row")
        if first is None or not isinstance(row, int) or not 0 <= first + row < self._source.num_rows:
            return None
        (values,) = self._source.read_rows(first + row, first + row + 1)
        decoded = self._decoder(values)
        expected = tuple(metadata.get(name) for name in ("num_frames", "height", "width"))
        if not isinstance(decoded, DecodedRow) or decoded.pixels.shape[:3] != expected:
            return None
        return decoded.pixels
