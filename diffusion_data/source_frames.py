"""A stored sample -> the frames that it was encoded from, by decoding its source row once more."""

from __future__ import annotations

import numpy as np

from diffusion_data.decoded_row import DecodedRow
from diffusion_data.latent_sample import LatentSample, parse_key
from diffusion_data.row_decoder import RowDecoder
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

    def frames_of(self, sample: LatentSample) -> np.ndarray | None:
        """uint8 (T, H, W, 3) that the sample was made of; None if its row doesn't give such frames now.

        Raises:
            UserError: the source can't be read any more.
        """
        metadata = sample.metadata
        first, row = self._first_rows.get(metadata.get("source_file", "")), metadata.get("source_row")
        if first is None or not isinstance(row, int) or not 0 <= first + row < self._source.num_rows:
            return None
        (values,) = self._source.read_rows(first + row, first + row + 1)
        decoded = self._decoder(values)
        expected = tuple(metadata.get(name) for name in ("num_frames", "height", "width"))
        _, number = parse_key(sample.key) or (row, None)
        if not isinstance(decoded, DecodedRow) or (number or 0) >= len(decoded.samples):
            return None
        pixels = decoded.samples[number or 0].pixels
        return pixels if pixels.shape[:3] == expected else None
