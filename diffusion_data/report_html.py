"""Facts and sheet entries -> one html page that loads nothing: pictures and style stand in it.

Captions, keys and column values are whatever a dataset holds, so all text goes through `_text`, and the page's own
policy forbids scripts and any address besides.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable

from diffusion_data import __version__
from diffusion_data.assets import REPORT_STYLE
from diffusion_data.report_facts import Facts
from diffusion_data.report_plots import Bars, Plot, Spreads
from diffusion_data.report_sheet import Pictures, SheetEntry

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_WIDE = 1.9  # aspect from which source and decoded picture stand one above the other
_LONG_NAME = 16  # characters, which may break into lines


def report_page(name: str, facts: Facts, entries: list[SheetEntry]) -> str:
    """The whole page. name: the dataset's, for its title."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_text(name)}: dataset report</title>
<style>
{REPORT_STYLE.read_text()}</style>
</head>
<body>
<header>
<h1>{_text(name)}</h1>
{_navigation(entries)}
<dl class="numbers">
{_lines(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in facts.numbers.items())}
</dl>
{_notes(facts.notes)}
</header>
<main>
{_sheet(entries)}
<h2 id="numbers">What the samples are</h2>
<p>Counted over {"all samples" if "rows" in facts.numbers else "the samples that were read"}.</p>
<div class="plots">
{_lines(map(_plot, facts.plots))}
</div>
</main>
<footer>Made by diffusion_data {_text(__version__)}. The plots also lie beside this page, as png.</footer>
</body>
</html>
"""


def _text(value: object) -> str:
    """Escaped for use between tags and inside quotes."""
    return html.escape(str(value), quote=True)


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


def _navigation(entries: list[SheetEntry]) -> str:
    pictures = '<a href="#pictures">Pictures</a>' if entries else ""
    return f'<nav aria-label="On this page">{pictures}<a href="#numbers">Numbers</a></nav>'


def _notes(notes: list[str]) -> str:
    return f'<ul class="notes">{_lines(f"<li>{_text(note)}</li>" for note in notes)}</ul>' if notes else ""


def _sheet(entries: list[SheetEntry]) -> str:
    if not entries:
        return ""
    compared = any(entry.source for entry in entries)
    told = (
        "On the left, or above, what was encoded; beside it what the stored latent decodes to. PSNR tells how near "
        "the two are: above 30 dB a difference is hard to see."
        if compared
        else "What the stored latents decode to."
    )
    return f"""<h2 id="pictures">What training will see</h2>
<p>{told}</p>
<div class="sheet">
{_lines(map(_figure, entries))}
</div>"""


def _figure(entry: SheetEntry) -> str:
    return f"""<figure>
{_pairs(entry)}
<figcaption>
<p tabindex="0" dir="auto">{_text(entry.caption) if entry.caption else "<i>no caption</i>"}</p>
<small>{_details(entry)}</small>
<small>{_text(entry.key)}</small>
</figcaption>
</figure>"""


def _pairs(entry: SheetEntry) -> str:
    """A clip plays; below it stand its first and last frame, to be compared at leisure."""
    if entry.decoded.moving is None:
        return _pair(entry, "first", "", None)
    last = f"frame {entry.frames_shown}"
    return _lines(
        [
            _pair(entry, "moving", "", None),
            _pair(entry, "first", "frame 1", entry.psnr_first),
            _pair(entry, "last", last, entry.psnr_last),
        ]
    )


def _pair(entry: SheetEntry, which: str, title: str, psnr: float | None) -> str:
    shape = "alone" if entry.source is None else "wide" if entry.width > _WIDE * entry.height else ""
    quality = "" if psnr is None else f", {_decibels(psnr)}"
    cells = []
    for side, pictures, more in (("source", entry.source, ""), ("decoded", entry.decoded, quality)):
        if pictures is not None:
            image = _image(entry, pictures, which, f"{side} {title}".strip())
            cells.append(f"<div><span>{_text(title or side)}{more}</span>{image}</div>")
    return f'<div class="pair {shape}">{"".join(cells)}</div>'


def _image(entry: SheetEntry, pictures: Pictures, which: str, what: str) -> str:
    image = (
        f'<img src="{_data_url(getattr(pictures, which))}" width="{entry.width}" height="{entry.height}" '
        f'loading="lazy" alt="{_text(f"{what}: {entry.caption or entry.key}")}">'
    )
    if which != "moving":
        return image
    # Whoever has asked for less motion gets the first frame.
    still = _data_url(pictures.first)
    return f'<picture><source media="(prefers-reduced-motion: reduce)" srcset="{still}">{image}</picture>'


def _data_url(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"


def _details(entry: SheetEntry) -> str:
    parts = [] if entry.psnr is None else [f"PSNR <b>{_decibels(entry.psnr)}</b>"]
    parts.append(f"{entry.width} × {entry.height}")
    if entry.frames_shown > 1:
        total = entry.num_frames or entry.frames_shown
        shown = "" if total == entry.frames_shown else f"first {entry.frames_shown} of "
        parts.append(f"{shown}{total} frames")
        parts.append("unknown rate" if entry.fps is None else f"{entry.fps:.4g} fps")
    if entry.mirrored:
        parts.append("mirrored copy")
    if entry.seconds is not None:
        parts.append(f"{entry.seconds[0]:.2f} to {entry.seconds[1]:.2f} s of its source")
    return " · ".join(parts)


def _decibels(psnr: float) -> str:
    return "equal" if math.isinf(psnr) else f"{psnr:.1f} dB"


def _plot(plot: Plot) -> str:
    """A table whose middle column is drawn: the numbers can be read, copied and heard."""
    return f'<section class="plot">\n{_bars(plot) if isinstance(plot, Bars) else _spreads(plot)}\n</section>'


def _bars(bars: Bars) -> str:
    rows = []
    for name, value in bars.values.items():
        kind = "none" if value == 0 else "muted" if name in bars.muted else ""
        bar = f'<div class="bar"><i class="{kind}" style="--share:{100 * value / bars.longest:.2f}%"></i></div>'
        rows.append(_row(name, bar, f"{value:,.10g}"))
    return _table(f"{_text(bars.title)} <small>{_text(bars.unit)}</small>", "", rows)


def _spreads(spreads: Spreads) -> str:
    low, high = spreads.bounds
    rows = []
    for channel, (mean, deviation) in enumerate(zip(spreads.means, spreads.deviations, strict=True)):
        start, middle, zero = (100 * (value - low) / (high - low) for value in (mean - deviation, mean, 0.0))
        places = f"--low:{start:.2f}%;--share:{200 * deviation / (high - low):.2f}%"
        drawn = (
            f'<div class="range" style="{places};--middle:{middle:.2f}%;--zero:{zero:.2f}%"><s></s><i></i><b></b></div>'
        )
        rows.append(_row(str(channel), drawn, f"{mean:+.2f} ± {deviation:.2f}".replace("-", "−")))
    return _table(_text(spreads.title), "<thead><tr><th>channel</th><th></th><th>mean ± std</th></tr></thead>", rows)


def _row(name: str, drawn: str, value: str) -> str:
    length = ' class="long"' if len(name) > _LONG_NAME else ""
    return (
        f'<tr><th scope="row"{length}>{_text(name)}</th><td aria-hidden="true">{drawn}</td><td>{_text(value)}</td></tr>'
    )


def _table(caption: str, head: str, rows: list[str]) -> str:
    return f"<table>\n<caption>{caption}</caption>{head}\n<tbody>\n{_lines(rows)}\n</tbody>\n</table>"
