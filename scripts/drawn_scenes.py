"""A random generator -> scenes of a few shapes before a background -> frames: uint8 (T, H, W, 3).

Used by make_sample_data.py and, as training pictures, by make_tiny_cosmos.py. Everything is drawn from
numbers, so that nobody's picture is in the package.

A scene is resolution-free: positions and sizes are fractions of the picture's shorter side, and time
runs from 0 to 1 over a clip. The same generator state therefore gives the same scene at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (44, 152, 72),
    "blue": (38, 84, 204),
    "yellow": (244, 206, 46),
    "orange": (240, 134, 32),
    "purple": (124, 58, 170),
    "pink": (240, 130, 176),
    "brown": (128, 84, 48),
    "black": (22, 22, 26),
    "white": (244, 244, 240),
    "grey": (136, 138, 142),
    "cyan": (64, 196, 208),
}
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star")
_ROUND = ("circle", "ring")
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "speckles", "hills", "sea", "night")
_GROUND_COLOURS = {
    "hills": {"green", "cyan"},
    "sea": {"blue", "white"},
    "night": {"black", "blue"},
}

PLACES: dict[str, tuple[float, float]] = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.22, 0.5),
    "on the right": (0.78, 0.5),
    "at the top": (0.5, 0.24),
    "at the bottom": (0.5, 0.76),
    "in the top left corner": (0.22, 0.24),
    "in the top right corner": (0.78, 0.24),
    "in the bottom left corner": (0.22, 0.76),
    "in the bottom right corner": (0.78, 0.76),
}
"""Caption words -> (x, y) as fractions of the width and height."""

MOTIONS: dict[str, str] = {
    "right": "moves from left to right",
    "left": "moves from right to left",
    "up": "rises from the bottom to the top",
    "down": "falls from the top to the bottom",
    "grows": "grows larger",
    "shrinks": "shrinks slowly",
    "turns": "turns around",
}
"""Of a shape over a clip -> caption words. A shape that is "still" keeps to its place."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    kind: str
    colour: str
    place: str
    size: float
    """Radius as a fraction of the picture's shorter side."""
    motion: str = "still"


@dataclass(frozen=True, kw_only=True)
class Scene:
    background: str
    colours: tuple[str, str]
    """Of the background: the second one is not used by all kinds."""
    shapes: tuple[Shape, ...]
    texture_seed: int
    """Of what the caption does not mention: where hills and speckles lie."""


def random_scene(
    rng: np.random.Generator,
    *,
    num_shapes: int,
    motion: str = "still",
    palette: Sequence[str] = tuple(COLOURS),
    backgrounds: Sequence[str] = BACKGROUNDS,
) -> Scene:
    """motion is the first shape's; the others stay where they are."""
    background = str(rng.choice(backgrounds))
    first, second = (str(colour) for colour in rng.choice(palette, size=2, replace=False))
    # A shape in the colour of what is behind it would be named and not seen.
    hidden = _GROUND_COLOURS.get(background, {first, second})
    colours = rng.permutation([colour for colour in palette if colour not in hidden])
    places = _apart(rng.permutation(list(PLACES)))
    # Nobody sees a circle turn.
    first_kinds = [kind for kind in SHAPES if motion != "turns" or kind not in _ROUND]
    shapes = tuple(
        Shape(
            kind=str(rng.choice(first_kinds if index == 0 else SHAPES)),
            colour=str(colours[index]),
            place=places[index],
            size=float(rng.uniform(0.13, 0.2)) * (1.3 if num_shapes == 1 else 1.0),
            motion=motion if index == 0 else "still",
        )
        for index in range(num_shapes)
    )
    return Scene(
        background=background,
        colours=(first, second),
        shapes=shapes,
        texture_seed=int(rng.integers(2**31)),
    )


def _apart(places: np.ndarray) -> list[str]:
    """Those of the places, in order, whose shapes do not cover each other."""
    chosen: list[str] = []
    for place in (str(place) for place in places):
        if all(np.hypot(*np.subtract(PLACES[place], PLACES[other])) > 0.35 for other in chosen):
            chosen.append(place)
    return chosen


def draw(scene: Scene, *, height: int, width: int, num_frames: int = 1) -> np.ndarray:
    """Returns uint8 (T, H, W, 3). Only the shapes move."""
    ground = _draw_background(scene, height, width)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        picture = ground.copy()
        for shape in scene.shapes:
            _draw_shape(picture, shape, time=index / max(num_frames - 1, 1))
        frames[index] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return frames


def _draw_background(scene: Scene, height: int, width: int) -> np.ndarray:
    """Returns float32 (H, W, 3) in 0..255."""
    first, second = (np.array(COLOURS[name], np.float32) for name in scene.colours)
    short_side = min(height, width)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / short_side
    rng = np.random.default_rng(scene.texture_seed)
    if scene.background == "plain":
        return np.broadcast_to(first, (height, width, 3)).copy()
    if scene.background == "gradient":
        across = rng.random() < 0.5
        return _mix(first, second, x / x.max() if across else y / y.max())
    if scene.background == "stripes":
        wave = np.sin(2 * np.pi * (x if rng.random() < 0.5 else y) * rng.uniform(2.5, 5))
        return _mix(first, second, _soft(wave * 0.05, short_side))
    if scene.background == "checks":
        wave = np.sin(2 * np.pi * x * 2.5) * np.sin(2 * np.pi * y * 2.5)
        return _mix(first, second, _soft(wave * 0.2, short_side))
    if scene.background == "speckles":
        inside = _dots(x, y, rng, count=70, radius=(0.012, 0.03))
        return _mix(first, second, _soft(inside, short_side))
    return _draw_landscape(scene.background, x, y, rng, short_side)


def _draw_landscape(kind: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, short_side: int) -> np.ndarray:
    down = y / y.max()
    sky_top, sky_bottom, land_far, land_near = {
        "hills": ((96, 160, 232), (206, 228, 246), (96, 170, 88), (52, 120, 56)),
        "sea": ((170, 200, 226), (246, 226, 200), (58, 128, 178), (20, 66, 128)),
        "night": ((8, 10, 34), (40, 44, 92), (30, 40, 52), (14, 20, 28)),
    }[kind]
    picture = _mix(np.array(sky_top, np.float32), np.array(sky_bottom, np.float32), down)
    if kind == "night":
        stars = _dots(x, y, rng, count=45, radius=(0.004, 0.01))
        picture = _mix(picture, np.array((240, 240, 220), np.float32), _soft(stars, short_side))
    if kind == "sea":
        horizon = np.full_like(x, 0.62)
        ripple = 0.5 + 0.5 * np.sin(40 * y**2 + 3 * np.sin(5 * x + rng.uniform(0, 6)))
        land = _mix(np.array(land_far, np.float32), np.array(land_near, np.float32), down)
        land += 14 * (ripple[..., None] - 0.5)
        return _mix(picture, land, _soft((down - horizon) * y.max(), short_side))
    for colour, base, height in ((land_far, 0.66, 0.08), (land_near, 0.8, 0.1)):
        ridge = base - height * np.sin(rng.uniform(2, 5) * x + rng.uniform(0, 6))
        inside = (down - ridge) * y.max()
        picture = _mix(picture, np.array(colour, np.float32), _soft(inside, short_side))
    return picture


def _draw_shape(picture: np.ndarray, shape: Shape, *, time: float) -> None:
    """Draws over picture, float32 (H, W, 3), in place."""
    height, width, _ = picture.shape
    short_side = min(height, width)
    place_x, place_y, size, angle = _pose(shape, time)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    radius = size * short_side
    # Large shapes near an edge are moved inwards until they are whole.
    dx = (x + 0.5 - np.clip(place_x * width, radius, width - radius)) / radius
    dy = (y + 0.5 - np.clip(place_y * height, radius, height - radius)) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    inside = _inside(shape.kind, dx * cos + dy * sin, dy * cos - dx * sin) * size
    alpha = _soft(inside, short_side)
    picture[:] = _mix(picture, np.array(COLOURS[shape.colour], np.float32), alpha)


def _pose(shape: Shape, time: float) -> tuple[float, float, float, float]:
    """Returns x, y, size and angle at a time from 0 to 1."""
    x, y = PLACES[shape.place]
    size, angle = shape.size, 0.0
    if shape.motion in ("right", "left"):
        x = 0.15 + 0.7 * (time if shape.motion == "right" else 1 - time)
    elif shape.motion in ("up", "down"):
        y = 0.15 + 0.7 * (time if shape.motion == "down" else 1 - time)
    elif shape.motion in ("grows", "shrinks"):
        size *= 0.5 + 1.0 * (time if shape.motion == "grows" else 1 - time)
    elif shape.motion == "turns":
        angle = time * np.pi
    return x, y, size, angle


def _inside(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the edge in units of the radius, positive inside."""
    if kind == "circle":
        return 1 - np.hypot(x, y)
    if kind == "ring":
        return 0.26 - np.abs(np.hypot(x, y) - 0.74)
    if kind == "square":
        return 0.86 - np.maximum(np.abs(x), np.abs(y))
    if kind == "diamond":
        return (1.05 - np.abs(x) - np.abs(y)) / np.sqrt(2)
    if kind == "triangle":
        return 0.55 - np.maximum(np.abs(x) * 0.866 - y * 0.5, y)
    if kind == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.minimum(1 - long, 0.32 - short)
    if kind == "star":
        around = np.mod(np.arctan2(x, -y), 2 * np.pi / 5) - np.pi / 5
        radius = np.hypot(x, y)
        tip, notch = 1.1, 0.45
        # The edge from a notch (at angle 0) to a tip (at angle pi / 5), as a line's signed distance.
        px, py = radius * np.cos(around), np.abs(radius * np.sin(around))
        ex, ey = tip * np.cos(np.pi / 5) - notch, tip * np.sin(np.pi / 5)
        return (py * ex - (px - notch) * ey) / np.hypot(ex, ey)
    raise ValueError(f"unknown shape {kind!r}, expected one of {SHAPES}")


def _dots(
    x: np.ndarray,
    y: np.ndarray,
    rng: np.random.Generator,
    *,
    count: int,
    radius: tuple[float, float],
) -> np.ndarray:
    inside = np.full_like(x, -1.0)
    for _ in range(count):
        dx, dy = x - rng.random() * x.max(), y - rng.random() * y.max()
        inside = np.maximum(inside, rng.uniform(*radius) - np.hypot(dx, dy))
    return inside


def _soft(inside: np.ndarray, short_side: int) -> np.ndarray:
    """Coverage 0..1 of a pixel whose centre is `inside` (in short sides) from an edge."""
    return np.clip(inside * short_side + 0.5, 0, 1)


def _mix(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (below + (above - below) * alpha[..., None]).astype(np.float32)
