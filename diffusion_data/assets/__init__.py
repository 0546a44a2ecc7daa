"""Name of a bundled model -> its folder; and the paths of the sample parquet and of the report's style."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

_FOLDERS = {
    "tiny-cosmos": "tiny_cosmos_tokenizer",
    "tiny-t5": "tiny_t5",
}

SAMPLE_PARQUET = _HERE / "sample" / "sample.parquet"
REPORT_STYLE = _HERE / "report.css"


def bundled(name: str) -> Path | None:
    """The folder of a bundled model, usable wherever a model's name is; None if it is not one of ours."""
    return _HERE / _FOLDERS[name] if name in _FOLDERS else None


def bundled_names() -> list[str]:
    return list(_FOLDERS)
