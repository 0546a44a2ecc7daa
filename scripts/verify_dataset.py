"""Check a finished dataset on its own: every sample, checksum and count. A line for each fault; exit code 1 if any.

python scripts/verify_dataset.py my_dataset
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from diffusion_data.errors import UserError
from diffusion_data.verify_dataset import verify_dataset


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--workers", type=int, help="processes; default: one a processor")
    arguments = parser.parse_args(words)
    if arguments.workers is not None and arguments.workers < 1:
        parser.error("--workers: at least 1")
    started = time.monotonic()
    try:
        verdict = verify_dataset(arguments.dataset, arguments.workers)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    for fault in verdict.faults:
        print(fault)
    if verdict.faults:
        parser.exit(1, f"{parser.prog}: {len(verdict.faults)} faults in {verdict.summary}\n")
    print(f"{verdict.summary}; no fault, {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
