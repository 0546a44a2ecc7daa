import sys

import pytest

pytest_plugins = ["diffusion_data.pytest_plugin"]


@pytest.fixture(autouse=True)
def _end_loader_workers():
    yield
    datamodules = sys.modules.get("tests.datamodules")  # imported by the tests that have any
    while datamodules is not None and datamodules.opened:
        datamodules.opened.pop().teardown()


@pytest.fixture
def one_torch_thread():
    """As jobs set it: the number of torch's threads changes bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
