"""Rows of media bytes and captions -> tars, the way of the original pipeline: what bench_prepare.py compares with.

One row at a time, text padded to 512 tokens, pixels scaled through float64, decoding and webdataset's writer in line.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import webdataset
from PIL import Image

from diffusion_data.encoders import Encoders


@torch.inference_mode()
def original_way(encoders: Encoders, rows: list[dict[str, Any]], folder: Path, threads: int) -> dict[str, float]:
    """Its wall and CPU time; the encoders are in float32."""
    folder.mkdir()
    torch.set_num_threads(threads)
    network, device = encoders.tokenizer.network, encoders.tokenizer.device
    tokenizer, t5 = encoders.text_encoder._tokenizer, encoders.text_encoder._model
    started = cpu_started = 0.0
    with webdataset.ShardWriter(str(folder / "%04d.tar"), verbose=False) as writer:
        for number, row in enumerate([rows[0], *rows]):  # the first one twice, to warm up
            if number == 1:
                started, cpu_started = time.perf_counter(), time.process_time()
            pixels = _decode(row["media"]["bytes"]) / 127.5 - 1  # float64
            video = torch.from_numpy(pixels).to(device, torch.float32).permute(3, 0, 1, 2)[None]
            latent = network.encode(video).latent_dist.mode()[0]
            text = tokenizer(
                row["caption"], max_length=512, padding="max_length", truncation=True, return_tensors="pt"
            ).to(device)
            mask = text.attention_mask
            embedding = t5(input_ids=text.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
            writer.write(
                {
                    "__key__": f"{number:09d}",
                    "pth": latent.to("cpu", torch.bfloat16),
                    "pickle": embedding[0].to("cpu", torch.float16).numpy(),
                    "json": {"caption": row["caption"], "image_height": pixels.shape[1]},
                }
            )
    return {
        "threads": threads,
        "samples_per_second": len(rows) / (time.perf_counter() - started),
        "cpu_seconds_a_sample": (time.process_time() - cpu_started) / len(rows),
    }


def _decode(data: bytes) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    if data[4:8] == b"ftyp":
        with av.open(io.BytesIO(data)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[None]
