import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.written_commands import PREPARE_SAMPLE, run_in

pytest_plugins = ["diffusion_data.pytest_plugin"]


@pytest.fixture(autouse=True)
def _end_loader_workers():
    yield
    datamodules = sys.modules.get("tests.datamodules")  # imported by the tests that have any
    while datamodules is not None and datamodules.opened:
        datamodules.opened.pop().teardown()


@pytest.fixture(scope="session")
def sample_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled sample as two processes prepare it, with its report. To be read; whoever alters it takes a copy."""
    folder = tmp_path_factory.mktemp("sample")
    finished = run_in(folder, PREPARE_SAMPLE)
    assert "56 rows = 56 written + 0 rejected" in finished.stdout
    assert "report: sample_dataset/run/report/index.html" in finished.stdout
    return folder / "sample_dataset"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server: see tests/fetching.py."""
    from tests.fetching import serving

    with serving(monkeypatch) as web:
        yield web


@pytest.fixture
def one_torch_thread():
    """As jobs set it: the number of torch's threads changes bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
