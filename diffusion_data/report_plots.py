"""What the report plots, as numbers with names: the html page draws them, and so does `write_png`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_data.durable_file import durable_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 12  # that a reader takes in at a glance

_BAR, _MUTED, _TEXT = "#2f6f9f", "#b9c4cc", "#22303a"


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Named amounts. `muted` names are drawn paler: times in which something only waited."""

    name: str
    title: str
    unit: str
    values: dict[str, float]
    muted: frozenset[str] = frozenset()

    @property
    def longest(self) -> float:
        return max(self.values.values(), default=0.0) or 1.0


@dataclass(frozen=True, kw_only=True)
class Spreads:
    """A mean and a standard deviation for each of a row of channels."""

    name: str
    title: str
    means: Sequence[float]
    deviations: Sequence[float]

    @property
    def bounds(self) -> tuple[float, float]:
        """What all bars from mean - deviation to mean + deviation lie in, and zero."""
        pairs = list(zip(self.means, self.deviations, strict=True))
        low = min((mean - deviation for mean, deviation in pairs), default=0.0)
        high = max((mean + deviation for mean, deviation in pairs), default=0.0)
        return min(low, 0.0), max(high, 0.0, min(low, 0.0) + 1e-9)


Plot = Bars | Spreads


def most_common(counts: Mapping[str, int]) -> dict[str, float]:
    """The largest counts, and what the others sum up to."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(ordered) <= MOST_BARS:
        return {name: float(count) for name, count in ordered}
    shown, others = ordered[: MOST_BARS - 1], ordered[MOST_BARS - 1 :]
    return {**dict(shown), f"{len(others)} others": float(sum(count for _, count in others))}


def histogram(counts: Mapping[float, int]) -> dict[str, float]:
    """Counts of numbers -> of each number, or of intervals of 1, 2 or 5 times a power of ten where they are many."""
    if len(counts) <= MOST_BARS:
        return {f"{value:g}": float(counts[value]) for value in sorted(counts)}
    low, high = min(counts), max(counts)
    width = _nice_width((high - low) / (MOST_BARS - 2))
    first = math.floor(low / width)
    bins = [0.0] * (math.floor(high / width) - first + 1)
    for value, count in counts.items():
        bins[math.floor(value / width) - first] += count
    whole = width >= 1 and all(float(value).is_integer() for value in counts)
    labels = (_interval((first + number) * width, width, whole) for number in range(len(bins)))
    return dict(zip(labels, bins, strict=True))


def _nice_width(at_least: float) -> float:
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= at_least * (1 - 1e-9))


def _interval(start: float, width: float, whole: bool) -> str:
    """ "20–29" of whole numbers, "0.5–1" of others."""
    return f"{start:g}" if whole and width == 1 else f"{start:g}–{start + width - whole:g}"


def write_png(plot: Plot, path: Path) -> None:
    """The plot as a picture, for slides and chats; the page itself doesn't need it."""
    with durable_file(path) as file:
        draw(plot).savefig(file, format="png", metadata={"Software": None})  # type: ignore[arg-type]


def draw(plot: Plot) -> Figure:
    """From top to bottom in the order of its values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and picks a display

    count = len(plot.values) if isinstance(plot, Bars) else len(plot.means)
    figure = Figure(figsize=(6.4, 0.9 + 0.3 * count), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(count)
    if isinstance(plot, Bars):
        colours = [_MUTED if name in plot.muted else _BAR for name in plot.values]
        bars = axes.barh(places, list(plot.values.values()), color=colours)
        axes.bar_label(bars, labels=[f"{value:,.6g}" for value in plot.values.values()], padding=4, color=_TEXT)
        axes.set_yticks(places, [_plain(name) for name in plot.values])
        axes.set_xlabel(plot.unit)
        axes.set_xlim(0, 1.15 * plot.longest)
    else:
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.errorbar(plot.means, places, xerr=plot.deviations, fmt="none", ecolor=_BAR, elinewidth=5)
        axes.plot(plot.means, places, "o", color="white", markersize=3)
        axes.set_xlabel("mean ± standard deviation")
        axes.set_yticks(places, [str(channel) for channel in places])
        axes.set_ylabel("channel")
    axes.invert_yaxis()
    axes.set_title(_plain(plot.title), color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _plain(text: str) -> str:
    """matplotlib takes $...$ for mathematics."""
    return text.replace("$", r"\$")
