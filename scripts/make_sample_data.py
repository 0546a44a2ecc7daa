"""Drawn scenes -> the package's sample parquet: columns id, media {bytes, path}, caption, aesthetic_score.

    python scripts/make_sample_data.py --output diffusion_data/assets/sample/sample.parquet

48 pictures and 8 clips, in mixed order, of many shapes and file formats, with captions that say what is
in them. The same bytes each time with the same versions of Pillow, PyAV and pyarrow.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawn_scenes import COLOURS, MOTIONS, Scene, Shape, draw, random_scene
from PIL import Image

DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "diffusion_data" / "assets" / "sample" / "sample.parquet"
NUM_PICTURES = 48
ROWS_PER_GROUP = 16

PICTURE_SIZES = ((160, 160), (144, 192), (192, 144), (128, 224), (240, 135), (150, 200), (256, 256))
"""(height, width) in pixels. Some are no multiple of 16, as it is with found pictures."""

CLIPS = (  # height, width, num_frames, fps
    (128, 128, 9, 8),
    (128, 160, 17, 12),
    (160, 128, 25, 25),
    (144, 256, 33, 30),
    (128, 192, 17, 10),
    (160, 160, 21, 24),
    (192, 128, 13, 15),
    (144, 144, 33, 16),
)
GREYS = ("black", "grey", "white")
FLAT_BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "speckles")
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("media", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("caption", pa.string()),
        ("aesthetic_score", pa.float64()),
    ]
)


def png(picture: Image.Image) -> bytes:
    return _saved(picture, format="PNG", optimize=True)


def jpeg(picture: Image.Image) -> bytes:
    return _saved(picture, format="JPEG", quality=90)


def webp(picture: Image.Image) -> bytes:
    return _saved(picture, format="WEBP", quality=88)


def palette_png(picture: Image.Image) -> bytes:
    return png(picture.quantize(64))


def cmyk_jpeg(picture: Image.Image) -> bytes:
    return jpeg(picture.convert("CMYK"))


def turned_jpeg(picture: Image.Image) -> bytes:
    """Stored lying on its side, with the EXIF note that cameras add: turn a quarter clockwise to view."""
    exif = Image.Exif()
    exif[0x0112] = 6
    on_its_side = picture.transpose(Image.Transpose.ROTATE_90)
    return _saved(on_its_side, format="JPEG", quality=90, exif=exif)


def grey_png(picture: Image.Image) -> bytes:
    return png(picture.convert("L"))


def deep_grey_png(picture: Image.Image) -> bytes:
    """16 bits a pixel."""
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    return png(Image.fromarray(grey))


COLOUR_FORMATS: tuple[tuple[str, Callable[[Image.Image], bytes]], ...] = (
    ("png", png),
    ("jpg", jpeg),
    ("webp", webp),
    ("jpg", jpeg),
    ("png", palette_png),
    ("webp", webp),
    ("jpg", turned_jpeg),
    ("jpg", cmyk_jpeg),
)
GREY_FORMATS: tuple[tuple[str, Callable[[Image.Image], bytes]], ...] = (
    ("png", grey_png),
    ("png", deep_grey_png),
)


def _saved(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


def cut_out_png(scene: Scene, height: int, width: int) -> bytes:
    """The shapes on a transparent ground: what the ground lets through is how far white and black differ."""
    on_white, on_black = (
        draw(replace(scene, colours=(ground, ground)), height=height, width=width)[0].astype(np.float32)
        for ground in ("white", "black")
    )
    through = np.subtract(COLOURS["white"], COLOURS["black"]).astype(np.float32)
    alpha = np.clip(1 - ((on_white - on_black) / through).mean(-1, keepdims=True), 0, 1)
    ground = (1 - alpha) * np.array(COLOURS["black"], np.float32)
    colour = (on_black - ground) / np.maximum(alpha, 1 / 255)
    pixels = np.concatenate([colour, alpha * 255], axis=-1)
    return png(Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGBA"))


def encode_clip(frames: np.ndarray, fps: int) -> bytes:
    """uint8 (T, H, W, 3) -> an h264 mp4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # With more threads, or with its assembler code, x264's bytes vary from run to run.
        options = {"crf": "20", "x264-params": "threads=1:asm=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def make_picture(index: int, rng: np.random.Generator) -> tuple[bytes, str, Scene]:
    """Returns the file's bytes, its suffix and what is in it."""
    height, width = PICTURE_SIZES[index % len(PICTURE_SIZES)]
    num_shapes = (1, 2, 1, 3)[index % 4]
    if index % 12 == 5:  # transparent: readers put it on white, and the caption says so
        colours = [colour for colour in COLOURS if colour != "white"]
        scene = random_scene(rng, num_shapes=num_shapes, palette=colours, backgrounds=("plain",))
        scene = replace(scene, colours=("white", "white"))
        return cut_out_png(scene, height, width), "png", scene
    if index % 12 == 10:
        scene = random_scene(rng, num_shapes=1, palette=GREYS, backgrounds=FLAT_BACKGROUNDS)
        suffix, encode = GREY_FORMATS[index // 12 % len(GREY_FORMATS)]
    else:
        scene = random_scene(rng, num_shapes=num_shapes)
        suffix, encode = COLOUR_FORMATS[index % len(COLOUR_FORMATS)]
    picture = Image.fromarray(draw(scene, height=height, width=width)[0])
    return encode(picture), suffix, scene


def make_clip(index: int, rng: np.random.Generator) -> tuple[bytes, str, Scene]:
    height, width, num_frames, fps = CLIPS[index]
    motion = list(MOTIONS)[index % len(MOTIONS)]
    scene = random_scene(rng, num_shapes=1 + index % 2, motion=motion)
    frames = draw(scene, height=height, width=width, num_frames=num_frames)
    return encode_clip(frames, fps), "mp4", scene


def describe(scene: Scene, *, detail: str) -> str:
    """The scene's caption; detail is "short" (first shape only), "plain" or "long"."""
    moving = any(shape.motion != "still" for shape in scene.shapes)
    shapes = scene.shapes[:1] if detail == "short" else scene.shapes
    parts = [_describe_shape(shape, detail=detail) for shape in shapes]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if detail == "short":
        return listed
    ground = _describe_background(scene)
    if detail == "plain":
        return f"{listed} {'over' if moving else 'on'} {ground}"
    what = "clip" if moving else "picture"
    count = {1: "one shape", 2: "two shapes", 3: "three shapes"}[len(shapes)]
    return (
        f"A drawn {what} with {count} in front of {ground}: {listed}. "
        f"{_describe_sizes(scene)} The edges are sharp, and nothing else "
        f"{'moves' if moving else 'is in the picture'}."
    )


def _describe_shape(shape: Shape, *, detail: str) -> str:
    article = "an" if shape.colour[0] in "aeiou" else "a"
    name = f"{article} {shape.colour} {shape.kind}"
    if shape.motion != "still":
        return f"{name} {MOTIONS[shape.motion]}"
    return name if detail == "short" else f"{name} {shape.place}"


def _describe_background(scene: Scene) -> str:
    first, second = scene.colours
    article = "an" if first[0] in "aeiou" else "a"
    return {
        "plain": f"{article} {first} background",
        "gradient": f"a background that fades from {first} to {second}",
        "stripes": f"{first} and {second} stripes",
        "checks": f"{first} and {second} checks",
        "speckles": f"{article} {first} background with {second} dots",
        "hills": "green hills under a light blue sky",
        "sea": "a blue sea under a pale sky",
        "night": "dark hills under a night sky with small stars",
    }[scene.background]


def _describe_sizes(scene: Scene) -> str:
    largest = max(scene.shapes, key=lambda shape: shape.size)
    if len(scene.shapes) == 1:
        return f"The {largest.kind} is {'large' if largest.size > 0.2 else 'small'}."
    return f"The largest of them is the {largest.colour} {largest.kind}."


def make_rows(seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    media = [make_picture(index, rng) for index in range(NUM_PICTURES)]
    media += [make_clip(index, rng) for index in range(len(CLIPS))]
    rows = []
    for number, index in enumerate(rng.permutation(len(media))):
        content, suffix, scene = media[index]
        name = f"scene-{number:03d}"
        detail = ("plain", "plain", "short", "plain", "long")[number % 5]
        rows.append(
            {
                "id": name,
                "media": {"bytes": content, "path": f"{name}.{suffix}"},
                "caption": describe(scene, detail=detail),
                "aesthetic_score": round(float(rng.uniform(3, 8)), 2),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the package's sample parquet.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = make_rows(arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table, arguments.output, row_group_size=ROWS_PER_GROUP)
    print(f"{len(rows)} rows, {arguments.output.stat().st_size / 1e6:.2f} MB in {arguments.output}")


if __name__ == "__main__":
    main()
