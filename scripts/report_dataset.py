"""Write the report of a dataset: an html page that needs no other file, and its plots as png.

    python scripts/report_dataset.py sample_dataset
    python scripts/report_dataset.py my_dataset --sources --samples 48
    python scripts/report_dataset.py elsewhere --tokenizer nvidia/Cosmos-0.1-Tokenizer-CV4x8x8 --output elsewhere_report

Goes to run/report/index.html of the dataset, or to --output. --sources shows what each sample was encoded from beside
what its latent decodes to. It calls the process function that run/config.yaml names, on the source that it names:
only for datasets of yours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from diffusion_data.command_line import config_folder, options_to_dataclass
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_sample import tokenizer_of
from diffusion_data.errors import UserError
from diffusion_data.job_report import report_folder
from diffusion_data.made_with import options_of_run
from diffusion_data.prepare_config import PrepareConfig
from diffusion_data.process_func_options import row_decoder
from diffusion_data.report import write_report
from diffusion_data.report_sheet import SheetOptions
from diffusion_data.scripts.preview_dataset import positive
from diffusion_data.source_frames import SourceFrames
from diffusion_data.sources import ParquetSource


def load_tokenizer(dataset: Path, name: str | None) -> CosmosTokenizer:
    return CosmosTokenizer.from_pretrained(
        name or tokenizer_of(dataset), device="cuda" if torch.cuda.is_available() else "cpu"
    )


def load_sources(dataset: Path, tokenizer: CosmosTokenizer) -> SourceFrames:
    """What run/config.yaml names: code of the dataset's maker runs."""
    try:
        config = options_to_dataclass(PrepareConfig, with_defaults(options_of_run(dataset)), "")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{dataset / 'run' / 'config.yaml'} can't be used: {error}") from error
    return SourceFrames(ParquetSource.open(config.source.path), row_decoder(config, tokenizer))


def with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The options of an earlier version, which had not all of today's, completed."""
    defaults = yaml.safe_load((config_folder() / "prepare.yaml").read_bytes())
    known = {name: value for name, value in defaults.items() if name not in ("defaults", "hydra")}
    groups = {name: {**value, **options[name]} for name, value in known.items() if isinstance(value, dict)}
    return {**known, **options, **groups}


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    defaults = SheetOptions()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--output", type=Path, help="folder to write to; default: run/report of the dataset")
    parser.add_argument("--tokenizer", help="name or folder; default: what made the dataset")
    parser.add_argument("--sources", action="store_true", help="show source pictures too; for datasets of yours")
    parser.add_argument("--samples", type=positive, default=defaults.num_samples, help="decoded; default: %(default)s")
    parser.add_argument(
        "--frames", type=positive, default=defaults.max_frames, help="shown of a clip; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=defaults.max_seconds, help="longest time to decode for; default: %(default)g"
    )
    arguments = parser.parse_args(words)
    dataset: Path = arguments.dataset
    if arguments.sources:
        sys.path.insert(0, os.getcwd())  # where the job that was started here found the process function too
    try:
        page = write_report(
            dataset,
            arguments.output or report_folder(dataset),
            partial(load_tokenizer, dataset, arguments.tokenizer),
            partial(load_sources, dataset) if arguments.sources else None,
            SheetOptions(num_samples=arguments.samples, max_frames=arguments.frames, max_seconds=arguments.seconds),
        )
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
