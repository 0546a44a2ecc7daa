"""The report at the end of a run: of a dataset that is finished, and stays so whatever goes wrong here.

Its page is written last, so a folder that has it has the report of what it holds: `RunFolder` takes it away before a
shard changes, and the next run to end writes it, also one that had nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.durable_file import remove_folder
from diffusion_data.prepare_config import TokenizerConfig
from diffusion_data.row_decoder import RowDecoder
from diffusion_data.source_frames import SourceFrames
from diffusion_data.sources import ParquetSource


def report_folder(output_dir: Path) -> Path:
    return output_dir / "run" / "report"


def write_job_report(
    output_dir: Path,
    source: ParquetSource,
    row_decoder: Callable[[CosmosTokenizer], RowDecoder],
    tokenizer: CosmosTokenizer,
    named: TokenizerConfig,
) -> str | None:
    """The line to print: where the report is, or why there is none; None if there was one. Raises nothing.

    tokenizer: the job's, most likely without its decoder; named: what it was loaded from
    """
    from diffusion_data.report import PAGE, write_report  # reads shards with what training reads them with
    from diffusion_data.report_sheet import SheetOptions

    folder = report_folder(output_dir)
    if (folder / PAGE).is_file():
        return None
    try:
        remove_folder(folder)  # of one that was interrupted, or a link, which would be followed
        page = write_report(
            output_dir,
            folder,
            lambda: _with_decoder(tokenizer, named),
            lambda loaded: SourceFrames(source, row_decoder(loaded)),
            SheetOptions(),
        )
    except Exception as error:  # noqa: BLE001 - the dataset is finished, so nothing may fail the job
        told = " ".join(f"{type(error).__name__}: {error}".split())
        return f"  no report, but the dataset is complete ({told}); the same command tries again"
    return f"  report: {page}"


def _with_decoder(tokenizer: CosmosTokenizer, named: TokenizerConfig) -> CosmosTokenizer:
    if tokenizer.network.decoder is not None:
        return tokenizer
    return CosmosTokenizer.from_pretrained(named.name, named.cache_dir, tokenizer.device, tokenizer.dtype)
