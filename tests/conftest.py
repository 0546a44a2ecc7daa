import sys

import pytest

pytest_plugins = ["diffusion_data.pytest_plugin"]


@pytest.fixture(autouse=True)
def _end_loader_workers():
    yield
    datamodules = sys.modules.get("tests.datamodules")  # imported by the tests that have any
    while datamodules is not None and datamodules.opened:
        datamodules.opened.pop().teardown()
