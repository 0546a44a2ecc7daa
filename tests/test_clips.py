"""A long video becomes several clips: exactly which frames, from when to when, and what is left out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from diffusion_data.clips import ClipCutter, LeftOut, covered_seconds
from diffusion_data.errors import Reason, RowRejected, UserError
from diffusion_data.media import Frames, MediaLoader
from diffusion_data.media_config import ClipsConfig, MediaConfig
from tests.media_files import frame_numbers, gradient, level, write_video


def loader(root: Path, clips: dict[str, Any] | None = None, **options: Any) -> MediaLoader:
    config = MediaConfig(**{"short_side": None, **options}, clips=ClipsConfig(**(clips or {})))
    return MediaLoader(config, str(root), 4, 16)


def numbers(clips: list[Frames]) -> list[list[int]]:
    return [frame_numbers(clip.pixels) for clip in clips]


def spans(clips: list[Frames]) -> list[tuple[float | None, float | None]]:
    return [(clip.start_seconds, clip.end_seconds) for clip in clips]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 frames at 10 fps."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 30)
    return folder


def test_clips_follow_each_other_and_what_is_no_whole_one_is_dropped(folder: Path) -> None:
    media = loader(folder, {"num_frames": 9})
    clips = media.load_clips("a.mp4")
    assert numbers(clips) == [list(range(start, start + 9)) for start in (0, 9, 18)]
    assert spans(clips) == [(0.0, 0.9), (0.9, 1.8), (1.8, 2.7)]
    assert {clip.fps for clip in clips} == {10.0}
    assert media.left_out == LeftOut(
        clips_dropped=1, seconds_kept=pytest.approx(2.7), seconds_left_out=pytest.approx(0.3)
    )


def test_a_stride_leaves_gaps_or_overlaps(folder: Path) -> None:
    gaps = loader(folder, {"num_frames": 5, "stride_frames": 12})
    assert numbers(gaps.load_clips("a.mp4")) == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16], [24, 25, 26, 27, 28]]
    overlaps = loader(folder, {"num_frames": 9, "stride_frames": 5, "max_per_row": 3})
    clips = overlaps.load_clips("a.mp4")
    assert numbers(clips) == [list(range(start, start + 9)) for start in (0, 5, 10)]
    assert np.shares_memory(clips[0].pixels, clips[1].pixels)  # frames in two clips are held once
    assert overlaps.left_out.seconds_kept == pytest.approx(1.9)  # and counted once


def test_a_stride_in_seconds_begins_with_the_first_frame_at_or_after_its_time(folder: Path) -> None:
    media = loader(folder, {"num_frames": 5, "stride_seconds": 0.75})
    clips = media.load_clips("a.mp4")
    assert numbers(clips) == [list(range(start, start + 5)) for start in (0, 8, 15, 23)]
    assert spans(clips) == [(0.0, 0.5), (0.8, 1.3), (1.5, 2.0), (2.3, 2.8)]


def test_no_more_than_the_maximum_is_decoded_and_the_rest_is_counted(tmp_path: Path) -> None:
    noise = list(np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8))
    write_video(tmp_path / "a.mp4", 40, gop_size=5, pictures=noise, container_options={"movflags": "faststart"})
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    data[-len(data) // 4 :] = b"\xff" * (len(data) // 4)  # the last frames
    media = loader(tmp_path, {"num_frames": 5, "stride_frames": 10, "max_per_row": 2})
    assert [clip.num_frames for clip in media.load_clips(bytes(data))] == [5, 5]
    assert (media.left_out.seconds_kept, media.left_out.seconds_left_out) == pytest.approx((1.0, 3.0))
    with pytest.raises(RowRejected) as rejected:  # a row is written with all of its clips or not at all
        loader(tmp_path, {"num_frames": 5, "stride_frames": 10}).load_clips(bytes(data))
    assert rejected.value.reason == Reason.decode_error


def test_clips_shorter_than_the_minimum_are_dropped_and_a_video_without_any_is_rejected(folder: Path) -> None:
    tail = loader(folder, {"num_frames": 13, "min_frames": 4})
    assert numbers(tail.load_clips("a.mp4")) == [list(range(13)), list(range(13, 26))]  # 4 frames are cut to 1
    assert (tail.left_out.clips_dropped, tail.left_out.frames_cut) == (1, 0)
    kept = loader(folder, {"num_frames": 13, "stride_frames": 12, "min_frames": 5})
    assert [len(each) for each in numbers(kept.load_clips("a.mp4"))] == [13, 13, 5]
    assert kept.left_out.frames_cut == 1
    with pytest.raises(
        RowRejected, match=r"too_few_frames: 30 frames, cut to 29, less than media\.clips\.num_frames=33"
    ):
        loader(folder, {"num_frames": 33}).load_clips("a.mp4")


def test_clips_of_a_resampled_video_are_frames_of_its_clock(folder: Path) -> None:
    clips = loader(folder, {"num_frames": 5, "stride_seconds": 1.2}, fps=5.0).load_clips("a.mp4")
    assert numbers(clips) == [[0, 2, 4, 6, 8], [12, 14, 16, 18, 20]]
    assert spans(clips) == [(0.0, 1.0), (1.2, 2.2)]


def test_clips_of_variable_frame_rate_tell_their_true_times_and_rates(tmp_path: Path) -> None:
    times = [*range(0, 1000, 200), *range(1000, 1500, 50), 1500]
    write_video(tmp_path / "a.mkv", len(times), at_milliseconds=times)
    clips = loader(tmp_path, {"num_frames": 5}).load_clips("a.mkv")
    assert numbers(clips) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert [start for start, _ in spans(clips)] == pytest.approx([0.0, 1.0, 1.25])
    assert [end for _, end in spans(clips)][:2] == pytest.approx([1.0, 1.25])  # where the next frame appears
    assert [clip.fps for clip in clips] == pytest.approx([5.0, 20.0, 20.0])


def test_frames_of_a_users_own_are_cut_alike(folder: Path) -> None:
    media = loader(folder, {"num_frames": 5, "stride_frames": 12})
    pixels = np.stack([np.full((64, 96, 3), level(number), np.uint8) for number in range(30)])
    clips = media.load_clips(Frames(pixels=pixels, fps=10.0, source_height=64, source_width=96))
    assert numbers(clips) == [[0, 1, 2, 3, 4], [12, 13, 14, 15, 16], [24, 25, 26, 27, 28]]
    assert spans(clips) == [(0.0, 0.5), (1.2, 1.7), (2.4, 2.9)]
    again = [media.conform(clip) for clip in clips]  # once cut, a clip stays as it is
    assert (numbers(again), spans(again)) == (numbers(clips), spans(clips))


def test_pictures_and_short_videos_give_one(folder: Path) -> None:
    media = loader(folder, {"num_frames": 9, "min_frames": 1})
    (picture,) = media.load_clips(gradient())
    assert (picture.fps, picture.start_seconds) == (None, None)
    whole = loader(folder).load_clips("a.mp4")
    assert [(clip.num_frames, clip.start_seconds) for clip in whole] == [(29, None)]


def test_a_clip_takes_the_largest_bucket_that_it_fills(folder: Path) -> None:
    media = loader(folder, frame_buckets=(1, 10, 25, 33))  # cut to 1, 9, 25, 33
    assert frame_numbers(media.load("a.mp4").pixels) == list(range(25))
    assert media.left_out.frames_cut == 5
    assert media.left_out.seconds_left_out == pytest.approx(0.5)
    several = loader(folder, {"num_frames": 17}, frame_buckets=(9, 17))
    assert numbers(several.load_clips("a.mp4")) == [list(range(17)), list(range(17, 26))]
    assert several.left_out.frames_cut == 4
    with pytest.raises(RowRejected, match=r"too_few_frames: 30 frames, less than media\.frame_buckets=33"):
        loader(folder, frame_buckets=(33, 65)).load("a.mp4")


def test_a_list_of_rates_takes_the_highest_that_is_not_above_the_videos(tmp_path: Path, folder: Path) -> None:
    loaded = loader(folder, allowed_fps=(4, 5, 12)).load("a.mp4")
    assert (loaded.fps, frame_numbers(loaded.pixels)[:4]) == (5.0, [0, 2, 4, 6])
    write_video(tmp_path / "ntsc.mp4", 9, fps=10)
    near = loader(tmp_path, allowed_fps=(5, 10.05)).load("ntsc.mp4")  # as 30 is for a video of 29.97
    assert (near.fps, frame_numbers(near.pixels)) == (10.0, list(range(9)))
    with pytest.raises(RowRejected, match=r"fps_too_low: 10 fps, below all of media\.allowed_fps=\[12\.0, 24\.0\]"):
        loader(folder, allowed_fps=(12, 24)).load("a.mp4")
    own = Frames(pixels=loaded.pixels, fps=10.0, source_height=64, source_width=96)
    assert loader(folder, allowed_fps=(4, 5)).conform(own).fps == 5.0


def combed(folder: Path, flagged: bool) -> Path:
    """A bar that moves by 8 pixels between the two halves of each frame."""
    path = folder / "a.mkv"
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("mpeg2video" if flagged else "ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.bit_rate = 8_000_000
        if flagged:
            stream.options = {"flags": "+ildct+ilme", "top": "1"}
        for number in range(8):
            picture = np.full((64, 96, 3), 40, np.uint8)
            picture[0::2, 8 * number : 8 * number + 16] = 220
            picture[1::2, 8 * number + 8 : 8 * number + 24] = 220
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def lines_differ(frames: Frames) -> float:
    """How much each line differs from the next: combs make it large."""
    pixels = frames.pixels[1:-1].astype(int)
    return float(np.abs(np.diff(pixels, axis=1)).mean())


def test_interlaced_frames_become_whole_pictures_of_the_same_number_and_times(tmp_path: Path) -> None:
    combed(tmp_path, flagged=True)
    as_stored = loader(tmp_path, deinterlace=False).load("a.mkv")
    whole = loader(tmp_path).load("a.mkv")
    assert (whole.num_frames, whole.fps, whole.height, whole.width) == (5, 25.0, 64, 96)
    assert lines_differ(whole) < 0.2 * lines_differ(as_stored)
    clips = loader(tmp_path, {"num_frames": 1, "stride_frames": 3}).load_clips("a.mkv")
    assert spans(clips) == [(0.0, 0.04), (0.12, 0.16), (0.24, 0.28)]


def test_frames_that_are_not_flagged_are_not_touched(tmp_path: Path) -> None:
    combed(tmp_path, flagged=False)
    np.testing.assert_array_equal(
        loader(tmp_path).load("a.mkv").pixels, loader(tmp_path, deinterlace=False).load("a.mkv").pixels
    )


@pytest.mark.parametrize("size", [(63, 95), (17, 33), (65, 1 + 96)])
def test_odd_sizes_are_decoded_whole(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    pictures = [gradient(height, width)] * 5
    write_video(
        tmp_path / "a.mkv", 5, height=height, width=width, codec="ffv1", pixel_format="yuv444p", pictures=pictures
    )
    media = MediaLoader(MediaConfig(short_side=None, min_side=1), str(tmp_path), 4, 1)
    loaded = media.load("a.mkv")
    assert (loaded.source_height, loaded.source_width) == size
    assert np.abs(loaded.pixels[0].astype(int) - pictures[0]).max() <= 4


def test_variants_are_the_sizes_and_mirrored_copies_of_each_sample() -> None:
    media = MediaLoader(MediaConfig(short_side=64, extra_short_sides=(32,), mirror=True), "/nowhere", 4, 16)
    found = list(media.variants(media.load(gradient(64, 96))))
    assert [(frames.height, frames.width, mirrored) for frames, mirrored in found] == [
        (64, 96, False), (64, 96, True), (32, 48, False), (32, 48, True),
    ]  # fmt: skip
    for plain, mirrored in (found[:2], found[2:]):
        np.testing.assert_array_equal(mirrored[0].pixels, plain[0].pixels[:, :, ::-1])
    (only,) = MediaLoader(MediaConfig(short_side=64), "/nowhere", 4, 16).variants(media.load(gradient(64, 96)))
    assert only[1] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": {"stride_frames": 3}}, "stride_frames needs num_frames"),
        (
            {"clips": {"num_frames": 9, "stride_frames": 3, "stride_seconds": 1.0}},
            "stride_frames=3 and stride_seconds=1",
        ),
        ({"clips": {"num_frames": 9, "min_frames": 17}}, "min_frames=17 is more than num_frames=9"),
        ({"clips": {"num_frames": 0}}, "num_frames must be above 0, got 0"),
        ({"clips": {"num_frames": 121, "max_per_row": 9}}, r"media\.clips\.max_per_row=9 of 121 frames are more than"),
        ({"clips": {"num_frames": 9}, "num_frames": 9}, r"media\.num_frames=9 and media\.clips\.num_frames=9"),
        ({"clips": {"num_frames": 9}, "frame_buckets": (9, 17)}, r"media\.clips\.num_frames=9 is not the largest of"),
        (
            {"clips": {"num_frames": 9}, "min_frames": 10},
            r"media\.min_frames=10 is more than media\.clips\.num_frames=9",
        ),
        ({"frame_buckets": (9, 17), "num_frames": 17}, r"media\.num_frames=17 and media\.frame_buckets=17"),
        ({"frame_buckets": (9, 17), "min_frames": 10}, r"media\.min_frames=10 is more than media\.frame_buckets=9"),
        ({"frame_buckets": (0, 17)}, r"media\.frame_buckets=\[0, 17\]: all must be above 0"),
        ({"fps": 8.0, "allowed_fps": (8,)}, r"media\.fps=8\.0 and media\.allowed_fps=\[8\.0\]: give one"),
        ({"short_side": 64, "extra_short_sides": (64,)}, r"media\.extra_short_sides=\[64\]: must be different"),
        ({"short_side": None, "extra_short_sides": (32,)}, r"below media\.short_side=None"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    clips = options.pop("clips", {})
    with pytest.raises(ValueError, match=message):
        MediaConfig(**options, clips=ClipsConfig(**clips))


def test_a_clip_that_the_tokenizer_cuts_below_the_minimum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"media\.clips\.min_frames=12: media\.clips\.num_frames=12 leaves only 9 frames"
    ):
        loader(tmp_path, {"num_frames": 12, "min_frames": 12})
    assert loader(tmp_path, {"num_frames": 12}).config.shortest_clip == (12, "media.clips.num_frames")


def test_beginnings_that_no_frame_is_near_are_left_out() -> None:
    cutter = ClipCutter(2, max_clips=9, stride_seconds=0.5)
    taken = [seconds for seconds in (0.0, 0.4, 3.1, 3.2, 3.4, 3.5, 3.6) if cutter.take(seconds)]
    assert taken == [0.0, 0.4, 3.1, 3.2, 3.5, 3.6]
    assert cutter.clips() == [(0, 2), (2, 4), (4, 6)]


def test_spans_that_overlap_are_counted_once() -> None:
    assert covered_seconds([(0.0, 1.0), (0.5, 1.5), (0.6, 0.9), (2.0, 3.0)]) == pytest.approx(2.5)


def test_a_video_cut_short_before_its_clips_are_complete_is_truncated(tmp_path: Path) -> None:
    noise = list(np.random.default_rng(0).integers(0, 256, (20, 64, 96, 3), dtype=np.uint8))
    whole = write_video(tmp_path / "a.mkv", 20, gop_size=4, pictures=noise).read_bytes()
    cut = io.BytesIO(whole[: len(whole) * 8 // 10]).getvalue()
    assert len(loader(tmp_path, {"num_frames": 5, "max_per_row": 2}).load_clips(cut)) == 2
    with pytest.raises(RowRejected) as rejected:
        loader(tmp_path, {"num_frames": 5}).load_clips(cut)
    assert rejected.value.reason == Reason.truncated
