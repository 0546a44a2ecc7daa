"""Make the pictures of docs/gallery.rst: the sample's report, as a browser shows it.

    python scripts/make_gallery.py
    python scripts/make_gallery.py --browser google-chrome --output elsewhere

Prepares the bundled sample in a temporary folder and opens its report in a headless Chromium (or Chrome): on a wide
screen in light, on a phone in dark.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Screen:
    """width, height: CSS pixels; shown_width: of the picture that is kept"""

    name: str
    width: int
    height: int
    dark: bool
    shown_width: int


SCREENS = (Screen("report_wide", 1440, 1500, False, 1000), Screen("report_phone", 390, 1400, True, 390))


def photograph(browser: str, page: Path, screen: Screen) -> Image.Image:
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={screen.width},{screen.height}"]
        command += [f"--blink-settings=preferredColorScheme={0 if screen.dark else 1}", f"--screenshot={shot}"]
        subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")


def main(words: Sequence[str] | None = None) -> None:
    """words: the command line; None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    parser.add_argument("--browser", default=found, help="default: the first of Chromium and Chrome that is installed")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "gallery")
    arguments = parser.parse_args(words)
    if arguments.browser is None:
        parser.exit(2, f"{parser.prog}: error: no Chromium and no Chrome here: give --browser\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "sample_dataset"
        script = REPOSITORY / "scripts" / "prepare_energon_dataset.py"
        subprocess.run([sys.executable, script, "recipe=sample", f"output_dir={dataset}"], check=True)
        for screen in SCREENS:
            shot = photograph(arguments.browser, dataset / "run" / "report" / "index.html", screen)
            shot.thumbnail((screen.shown_width, 10_000), Image.Resampling.LANCZOS)
            file = arguments.output / f"{screen.name}.webp"
            shot.save(file, quality=70, method=6)
            print(f"wrote {file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
