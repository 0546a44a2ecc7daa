"""What is drawn has the values and names that the plot was made from, and the file holds what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from diffusion_data.report_plots import Bars, Spreads, draw, histogram, most_common, write_png

BARS = Bars(
    name="stage_times", title="Times", unit="seconds",
    values={"decode": 40.5, "$x$": 3.0, "waiting": 1200.0}, muted=frozenset({"waiting", "another"}),
)  # fmt: skip
SPREADS = Spreads(name="latents", title="Latents", means=[0.5, -1.25, 0.0], deviations=[1.0, 0.75, 2.0])


def test_bars_are_as_long_as_their_values_under_their_names() -> None:
    (axes,) = draw(BARS).axes
    bars: list[Any] = list(axes.patches)
    assert [bar.get_width() for bar in bars] == [40.5, 3.0, 1200.0]
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == list(axes.get_yticks()) == [0, 1, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["decode", r"\$x\$", "waiting"]
    assert [text.get_text() for text in axes.texts] == ["40.5", "3", "1,200"]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == ["#2f6f9f", "#2f6f9f", "#b9c4cc"]
    assert (axes.get_title(), axes.get_xlabel()) == ("Times", "seconds")
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first at the top


def test_spreads_reach_from_mean_minus_to_mean_plus_deviation() -> None:
    (axes,) = draw(SPREADS).axes
    bars: Any = axes.collections[0]
    assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [[-0.5, 1.5], [-2.0, -0.5], [-2.0, 2.0]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0, 0], [1, 1], [2, 2]]
    zero, middles = axes.lines[0], axes.lines[-1]
    assert np.unique(zero.get_xdata()) == [0]
    assert (list(middles.get_xdata()), list(middles.get_ydata())) == ([0.5, -1.25, 0.0], [0, 1, 2])
    assert (axes.get_title(), axes.get_xlabel()) == ("Latents", "mean ± standard deviation")


@pytest.mark.parametrize("plot", [BARS, SPREADS], ids=["bars", "spreads"])
def test_the_file_holds_what_is_drawn(plot: Bars | Spreads, tmp_path: Path) -> None:
    write_png(plot, tmp_path / "plot.png")
    canvas: Any = draw(plot).canvas
    canvas.draw()
    with Image.open(tmp_path / "plot.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(canvas.buffer_rgba()))


def test_the_most_common_are_named_and_the_others_summed_up() -> None:
    assert list(most_common({"a": 1, "b": 3, "c": 1}).items()) == [("b", 3), ("a", 1), ("c", 1)]
    many = {f"{number:02d}": 100 - number for number in range(20)}
    shown = most_common(many)
    assert list(shown)[:2] == ["00", "01"]
    assert len(shown) == 12
    assert list(shown.items())[-1] == ("9 others", sum(range(81, 90)))


def test_few_numbers_are_told_apart_and_many_are_put_into_intervals() -> None:
    assert list(histogram({30.0: 2, 1.0: 1, 23.976: 5}).items()) == [("1", 1), ("23.976", 5), ("30", 2)]
    whole = histogram({float(number): 1 for number in range(5, 48)})
    assert list(whole.items()) == [
        ("5–9", 5), ("10–14", 5), ("15–19", 5), ("20–24", 5), ("25–29", 5), ("30–34", 5), ("35–39", 5),
        ("40–44", 5), ("45–49", 3),
    ]  # fmt: skip
    parts = histogram({number / 10: 1 for number in range(13)})
    assert next(iter(parts)) == "0–0.2"
    assert sum(parts.values()) == 13
