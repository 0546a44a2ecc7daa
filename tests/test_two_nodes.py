"""Two torchrun agents that meet over a c10d rendezvous, as two nodes do, write the bytes of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from diffusion_data.prepare_energon_dataset import prepare
from tests.small_source import prepare_config, source_rows, write_source
from tests.test_prepare import tar_bytes

REPOSITORY = Path(__file__).parent.parent
OPTIONS = ["recipe=media_caption", "metadata_columns=[score]", "samples_per_shard=4", "media.short_side=48"]


def start_node(endpoint: str, *options: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--rdzv_id=two_nodes"]
    script = str(REPOSITORY / "scripts" / "prepare_energon_dataset.py")
    return subprocess.Popen(
        [*command, script, *OPTIONS, "num_workers=1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )


def test_two_nodes_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source.parquet", source_rows(22))
    prepare(prepare_config(source, tmp_path / "one"))
    with socket.create_server(("localhost", 0)) as free:
        endpoint = f"localhost:{free.getsockname()[1]}"
    options = [f"source.path={source}", f"output_dir={tmp_path / 'two'}"]
    nodes = [start_node(endpoint, *options, cwd=tmp_path) for _ in range(2)]
    try:
        said = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert tar_bytes(tmp_path / "two") == tar_bytes(tmp_path / "one")
    assert "".join(said).count("22 rows = 22 written + 0 rejected") == 1
