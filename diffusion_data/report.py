"""A dataset folder -> its report: index.html, which needs no other file, and its plots as png.

    facts (stats.json, or samples) ─┐
    contact sheet (latents decoded) ┴─▶ run/report/index.html, run/report/*.png

Whatever can't be shown is a line on the page, so that the rest still is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.durable_file import durable_file
from diffusion_data.errors import UserError
from diffusion_data.report_facts import gather_facts
from diffusion_data.report_html import report_page
from diffusion_data.report_plots import write_png
from diffusion_data.report_sheet import SheetEntry, SheetOptions, make_sheet
from diffusion_data.source_frames import SourceFrames
from diffusion_data.spread_samples import find_shards

PAGE = "index.html"


def write_report(
    dataset: Path,
    folder: Path,
    load_tokenizer: Callable[[], CosmosTokenizer],
    load_sources: Callable[[CosmosTokenizer], SourceFrames] | None,
    options: SheetOptions,
) -> Path:
    """Write the report of `dataset` into `folder`; returns the page's path.

    load_tokenizer: with its decoder; a UserError costs the contact sheet, and the page says so
    load_sources: None, or a UserError, shows decoded pictures alone

    Raises:
        UserError: no shards, or the folder can't be written.
    """
    shards = find_shards(dataset)
    facts = gather_facts(dataset, shards)
    notes = list(facts.notes)
    entries = _sheet(shards, load_tokenizer, load_sources, options, notes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in facts.plots:
            write_png(plot, folder / f"{plot.name}.png")
        with durable_file(folder / PAGE) as file:
            name = dataset.resolve().name
            file.write(report_page(name, replace(facts, notes=list(dict.fromkeys(notes))), entries).encode())
    except OSError as error:
        raise UserError(f"can't write the report to {folder}: {error}") from error
    return folder / PAGE


def _sheet(
    shards: list[Path],
    load_tokenizer: Callable[[], CosmosTokenizer],
    load_sources: Callable[[CosmosTokenizer], SourceFrames] | None,
    options: SheetOptions,
    notes: list[str],
) -> list[SheetEntry]:
    try:
        tokenizer = load_tokenizer()
    except UserError as error:
        notes.append(f"No pictures are shown: {error}.")
        return []
    try:
        sources = None if load_sources is None else load_sources(tokenizer)
        return make_sheet(shards, tokenizer, sources, options, notes)
    except UserError as error:
        notes.append(f"Source pictures are not shown: {error}.")
        return make_sheet(shards, tokenizer, None, options, notes)
