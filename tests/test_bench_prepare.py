"""The benchmark runs from one command, and its figures belong together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_data.batching import Budgets
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.encoders import Encoders
from diffusion_data.scripts.bench_ceilings import ceilings
from diffusion_data.t5_text_encoder import T5TextEncoder

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_run_gives_a_table_and_json(tmp_path: Path, processes: int) -> None:
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_prepare.py"), "--no-random-weights"]
    command += ["--tokenizer", "tiny-cosmos", "--text-encoder", "tiny-t5", "--pixels", "32", "--rows", "48"]
    command += ["--original-rows", "2", "--repeats", "1", "--num-workers", "1", "--processes", str(processes)]
    command += ["--peak-tflops", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "speedup over the original's way" in ran.stdout
    result = json.loads((tmp_path / "bench_prepare.json").read_text())
    assert result["samples_per_second"] == pytest.approx(48 / result["phase_seconds"]["encode"])
    assert result["fraction_of_ceiling"] == pytest.approx(
        sum(stage["busy_share"] for stage in result["stages"].values()), rel=1e-3
    )
    fastest = max(each["samples_per_second"] for each in result["original"])
    assert result["speedup_over_original"] == pytest.approx(result["samples_per_second"] / fastest)
    assert set(result["stages"]) == {"decode", "text_encoder", "text_tokens", "tokenizer", "write"}
    for alone in result["encoder_alone"].values():
        assert 0 < alone["tflops"] < 2
        assert alone["share_of_peak"] == alone["tflops"] / 2


def test_arithmetic_is_that_of_the_networks_padding_included() -> None:
    device = torch.device("cpu")
    encoders = Encoders(
        tokenizer=CosmosTokenizer.from_pretrained("tiny-cosmos", device=device, decoder=False),
        text_encoder=T5TextEncoder.from_pretrained("tiny-t5", device=device),
    )
    captions = ["a circle", "a red square and a blue circle"]
    counted = ceilings(encoders, Budgets(pixels=16 * 16 * 2, tokens=100), (1, 16, 16, 3), 2, captions, 0, False)

    config = encoders.text_encoder._model.config
    tokens = len(captions) * max(map(len, encoders.text_encoder.tokenize(captions)))
    projections = 4 * config.d_model * config.num_heads * config.d_kv
    feed_forward = (3 if config.is_gated_act else 2) * config.d_model * config.d_ff
    products = config.num_layers * tokens * (projections + feed_forward)
    assert counted["text_encoder"].flop_a_sample == 2 * products / len(captions)
    assert counted["tokenizer"].flop_a_sample > 2 * 16 * 16  # its convolutions are counted, too
