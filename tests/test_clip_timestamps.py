"""Clips of the bundled sample: what is stored decodes to the frames that the source shows at the json's times.

The source is decoded by PyAV alone, whole and in order, and resized by Pillow. A latent is told from that of the same
clip one frame earlier or later: it must be far nearer to that of its own frames.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion_data.assets import SAMPLE_PARQUET
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_sample import decode_sample, psnr_db
from diffusion_data.latent_sample import LatentSample
from diffusion_data.media_config import ClipsConfig, MediaConfig
from diffusion_data.prepare_energon_dataset import prepare
from diffusion_data.shard_reader import read_shard
from tests.small_source import prepare_config, write_source

CLIP_FRAMES = 9
SIDE = 64


@dataclass(frozen=True)
class Source:
    """times: seconds of each frame since the first; pixels: uint8 (T, H, W, 3) of the frames"""

    times: list[float]
    pixels: np.ndarray

    def frame_at(self, seconds: float) -> int:
        """Number of the frame that appears then."""
        (number,) = [number for number, time in enumerate(self.times) if math.isclose(time, seconds, abs_tol=1e-6)]
        return number


def decoded_by_pyav(data: bytes, height: int, width: int) -> Source:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    begin = frames[0].pts * frames[0].time_base
    times = [float(frame.pts * frame.time_base - begin) for frame in frames]
    return Source(times, np.stack([fitted(frame.to_image(), height, width) for frame in frames]))


def fitted(picture: Image.Image, height: int, width: int) -> np.ndarray:
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height)))


@pytest.fixture(scope="module")
def videos() -> list[bytes]:
    rows = pq.read_table(SAMPLE_PARQUET, columns=["media"]).column("media").to_pylist()
    return [row["bytes"] for row in rows if b"ftyp" in row["bytes"][:12]]


@pytest.fixture(scope="module")
def clips(videos: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> list[LatentSample]:
    folder = tmp_path_factory.mktemp("clips")
    rows = [{"media": {"bytes": video, "path": None}, "caption": "a clip"} for video in videos]
    source = write_source(folder / "source.parquet", rows)
    media = MediaConfig(short_side=SIDE, clips=ClipsConfig(num_frames=CLIP_FRAMES, stride_frames=6))
    prepare(prepare_config(source, folder / "dataset", metadata_columns=(), samples_per_shard=8, media=media))
    return list(read_shard(folder / "dataset/shard_000000.tar"))


def with_sources(clips: list[LatentSample], videos: list[bytes]) -> Iterator[tuple[LatentSample, Source]]:
    for clip in clips:
        height, width = clip.metadata["height"], clip.metadata["width"]
        yield clip, decoded_by_pyav(videos[clip.metadata["source_row"]], height, width)


def test_the_times_are_those_of_the_first_and_last_frame(clips: list[LatentSample], videos: list[bytes]) -> None:
    ends: list[list[tuple[int, int]]] = [[] for _ in videos]
    for clip, source in with_sources(clips, videos):
        json = clip.metadata
        last_appears = json["end_seconds"] - 1 / json["framerate"]
        ends[json["source_row"]].append((source.frame_at(json["start_seconds"]), source.frame_at(last_appears)))
    of_33_frames = [(0, 8), (6, 14), (12, 20), (18, 26), (24, 32)]
    assert ends == [of_33_frames[:number] for number in (1, 3, 3, 1, 5, 2, 2, 5)]


def test_a_latent_is_that_of_the_frames_at_its_times(clips: list[LatentSample], videos: list[bytes]) -> None:
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    compared = 0
    for clip, source in with_sources(clips, videos):
        first = source.frame_at(clip.metadata["start_seconds"])
        for beginning in (first - 1, first, first + 1):
            frames = source.pixels[max(0, beginning) :][:CLIP_FRAMES]
            if beginning < 0 or len(frames) < CLIP_FRAMES:
                continue
            made_again = tokenizer.encode(torch.from_numpy(frames)[None])[0]
            likeness = signal_to_noise_db(clip.latent, made_again)
            assert likeness > 50 if beginning == first else likeness < 40, (clip.key, beginning - first)
            compared += 1
    assert compared == 22 + 14 + 18


def test_a_clip_decodes_to_its_first_and_last_frame(clips: list[LatentSample], videos: list[bytes]) -> None:
    """Of all frames of the source none is nearer; the last is blurred by those before it, so one of them may be."""
    tokenizer = CosmosTokenizer.from_pretrained("tiny-cosmos")
    for clip, source in with_sources(clips, videos):
        decoded = decode_sample(clip, tokenizer)
        first = source.frame_at(clip.metadata["start_seconds"])
        likeness = [psnr_db(decoded[0], frame) for frame in source.pixels]
        assert likeness[first] > max(likeness) - 0.05, clip.key
        last = first + CLIP_FRAMES - 1
        likeness = [psnr_db(decoded[-1], frame) for frame in source.pixels]
        assert max(likeness[last - 1 : last + 1]) > max(likeness) - 0.05, clip.key


def signal_to_noise_db(latent: torch.Tensor, other: torch.Tensor) -> float:
    noise = (latent.float() - other.float()).square().mean()
    return float(10 * (latent.float().square().mean() / noise.clamp(min=1e-12)).log10())
