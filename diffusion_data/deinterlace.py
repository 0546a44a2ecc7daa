"""Decoded frames, some of them flagged as interlaced -> whole pictures, one for each frame.

An interlaced frame holds two moments, in its even and its odd lines: whatever moves has combs. FFmpeg's bwdif keeps
the lines of the first moment and finds the others from the frames before and after. It is made when the first
flagged frame comes, so progressive video never passes through a filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any


def deinterlaced(frames: Iterable[Any]) -> Iterator[Any]:
    """The same number of frames, with their times; those that aren't flagged keep their pixels."""
    graph: Any = None
    kind: tuple[Any, ...] = ()
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is not None and kind != _kind(frame):  # a stream may change its size
            yield from _rest(graph)
            graph = None
        if graph is None:
            graph, kind = _graph(frame), _kind(frame)
        graph.push(frame)
        yield from _ready(graph)
    if graph is not None:
        yield from _rest(graph)


def _kind(frame: Any) -> tuple[Any, ...]:
    return frame.width, frame.height, frame.format.name


def _graph(frame: Any) -> Any:
    import av

    graph = av.filter.Graph()
    if hasattr(graph, "threads"):  # an older PyAV can't be told
        graph.threads = 1  # one worker a core already
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    # send_frame: a picture for each frame, not for each half of one; deint: only what is flagged.
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def _ready(graph: Any) -> Iterator[Any]:
    import av

    with suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.pull()


def _rest(graph: Any) -> Iterator[Any]:
    graph.push(None)
    yield from _ready(graph)
