"""The ready-made process functions: what each takes, and what it rejects before or after fetching."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from diffusion_data.errors import Reason, RowRejected
from diffusion_data.media import MediaConfig, MediaLoader
from diffusion_data.process_funcs import butterflies, image_caption, media_caption, video_caption
from tests.small_source import clip_bytes, picture_bytes

PICTURE, CLIP = picture_bytes(1), clip_bytes(1)


def loader(**options: Any) -> MediaLoader:
    return MediaLoader(MediaConfig(short_side=48, **options), "/nowhere", 4, 16)


def reason_of(function: Any, row: dict[str, Any], **arguments: Any) -> Reason:
    with pytest.raises(RowRejected) as rejected:
        function(row, media=loader(), **arguments)
    return rejected.value.reason


def test_media_caption_tells_pictures_from_clips_by_content() -> None:
    picture = media_caption({"media": PICTURE, "caption": "one"}, media=loader())
    clip = media_caption({"media": CLIP, "caption": "two"}, media=loader())
    assert (picture.frames.pixels.shape, picture.frames.fps, picture.caption) == ((1, 48, 64, 3), None, "one")
    assert (clip.frames.pixels.shape, clip.frames.fps, clip.caption) == ((9, 48, 64, 3), 8.0, "two")


def test_media_caption_takes_the_first_of_several_columns_that_is_not_null() -> None:
    row = {"mp4": None, "jpg": PICTURE, "text": "a picture"}
    sample = media_caption(row, media=loader(), media_column=["mp4", "jpg"], caption_column="text")
    assert sample.frames.num_frames == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"media": None, "caption": "x"}, Reason.null_media),
        ({"media": PICTURE, "caption": None}, Reason.null_caption),
        ({"media": PICTURE, "caption": "  "}, Reason.null_caption),
        ({"media": PICTURE, "caption": 7}, Reason.caption_not_text),
        ({"media": b"", "caption": "x"}, Reason.empty),
        ({"media": b"text", "caption": "x"}, Reason.not_media),
    ],
)
def test_media_caption_rejects_with_the_reason(row: dict[str, Any], reason: Reason) -> None:
    assert reason_of(media_caption, row) is reason


def test_a_row_without_a_caption_is_rejected_before_its_media_is_fetched() -> None:
    assert reason_of(media_caption, {"media": "/no/such/file.png", "caption": None}) is Reason.null_caption


def test_image_caption_takes_pictures_only() -> None:
    assert image_caption({"image": PICTURE, "caption": "x"}, media=loader()).frames.num_frames == 1
    assert reason_of(image_caption, {"image": CLIP, "caption": "x"}) is Reason.unsupported_format


def test_video_caption_takes_clips_only() -> None:
    assert video_caption({"video": CLIP, "caption": "x"}, media=loader()).frames.num_frames == 9
    assert reason_of(video_caption, {"video": PICTURE, "caption": "x"}) is Reason.unsupported_format


@pytest.fixture
def server() -> Iterator[str]:
    """Serves one butterfly on loopback; everything else is a 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/butterfly.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(PICTURE if found else b"")

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_butterflies_fetches_the_picture_and_takes_the_name_for_caption(server: str) -> None:
    media = loader(allowed_hosts=("127.0.0.1",))
    sample = butterflies({"image_url": f"{server}/butterfly.png", "name": "Papilio ulysses"}, media=media)
    assert (sample.frames.pixels.shape, sample.caption) == ((1, 48, 64, 3), "Papilio ulysses")
    with pytest.raises(RowRejected) as gone:
        butterflies({"image_url": f"{server}/gone.png", "name": "Papilio"}, media=media)
    assert gone.value.reason is Reason.not_found
