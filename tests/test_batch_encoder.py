"""Batches in threads give the bits of batches in line; memory that doesn't suffice halves a batch and is noted."""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest
import torch

from diffusion_data.batch_encoder import BatchEncoder, BatchRecord
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.errors import UserError
from diffusion_data.t5_text_encoder import T5TextEncoder


@pytest.fixture(scope="module")
def tokenizer() -> CosmosTokenizer:
    return CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False)


@pytest.fixture(scope="module")
def text_encoder() -> T5TextEncoder:
    return T5TextEncoder.from_pretrained("tiny-t5")


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 1, 32, 48, 3), np.uint8))


def refuse_above(limit: int, encoder: object, method: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the encoder run out of memory for larger batches; returns the sizes of those that it was asked for."""
    original = getattr(encoder, method)
    asked: list[int] = []

    def limited(batch: list) -> object:
        asked.append(len(batch))
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(batch)

    monkeypatch.setattr(encoder, method, limited)
    return asked


@pytest.mark.usefixtures("one_torch_thread")
def test_threads_change_no_bit(tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder) -> None:
    results = []
    for num_threads in (0, 1, 3):
        with BatchEncoder(tokenizer, text_encoder, num_threads) as encoder:
            futures = [encoder.encode_frames(pictures(3, seed), BatchRecord()) for seed in range(12)]
            futures.append(encoder.encode_tokens([[5, 6, 1], [7, 1]], BatchRecord(), 2))
            results.append([torch.stack(list(future.result())) for future in futures[:-1]])
            results[-1] += futures[-1].result()
    assert [tensor.shape for tensor in results[0][-2:]] == [(3, 1024), (2, 1024)]
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_a_few_batches_run_ahead_and_no_more(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    original = tokenizer.encode

    def held(frames: torch.Tensor) -> torch.Tensor:
        assert go_on.wait(20)
        return original(frames)

    monkeypatch.setattr(tokenizer, "encode", held)
    with BatchEncoder(tokenizer, text_encoder, num_threads=1) as encoder:
        record = BatchRecord()
        for _ in range(2):
            encoder.encode_frames(pictures(1), record)
        threading.Timer(0.2, go_on.set).start()
        encoder.encode_frames(pictures(1), record)  # waits for the first
    assert record.times.seconds()["wait_for_encoders"] > 0.1


def test_a_batch_that_memory_does_not_suffice_for_is_halved_and_noted(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pictures(7)
    with BatchEncoder(tokenizer, text_encoder, 0) as encoder:
        whole = encoder.encode_frames(batch, BatchRecord()).result()
        asked = refuse_above(2, tokenizer, "encode", monkeypatch)
        record = BatchRecord()
        halves = encoder.encode_frames(batch, record).result()
        assert asked == [7, 4, 2, 2, 2, 1]  # 3 is known not to fit
        assert record.halved == ["7 frames", "4 frames", "3 frames"]
        torch.testing.assert_close(torch.stack(list(halves)), torch.stack(list(whole)), atol=0.01, rtol=0.02)

        captions = [[5, 6, 1], [7, 1], [8, 1]]
        alone = encoder.encode_tokens(captions, BatchRecord(), 3).result()
        refuse_above(1, text_encoder, "encode_tokens", monkeypatch)
        encoded = encoder.encode_tokens(captions, record, 3).result()
        assert record.halved[3:] == ["3 tokens", "2 tokens"]
        assert [len(each) for each in encoded] == [3, 2, 2]
        for one, other in zip(alone, encoded, strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=0)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_too_little_memory_for_one_sample_is_told(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_above(0, tokenizer, "encode", monkeypatch)
    with (
        BatchEncoder(tokenizer, text_encoder, num_threads) as encoder,
        pytest.raises(UserError, match="cpu has too little memory for one sample's frames: CUDA out of memory"),
    ):
        encoder.encode_frames(pictures(2), BatchRecord()).result()


class Told:
    """An on_done: the samples of each kind that were told, and whether each batch took time."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self.seconds: list[float] = []

    def __call__(self, kind: str, num_samples: int, seconds: float) -> None:
        self.samples[kind] += num_samples
        self.seconds.append(seconds)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_batch_is_told_when_it_is_done(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    original = text_encoder.encode_tokens

    def held(batch: list[list[int]]) -> list[torch.Tensor]:
        assert go_on.wait(20)
        return original(batch)

    monkeypatch.setattr(text_encoder, "encode_tokens", held)
    told = Told()
    with BatchEncoder(tokenizer, text_encoder, num_threads, on_done=told) as encoder:
        encoder.encode_frames(pictures(3), BatchRecord()).result()
        assert told.samples == {"frames": 3}
        if not num_threads:
            go_on.set()
        encoder.encode_tokens([[5, 6, 1], [7, 1]], BatchRecord(), 9)
        assert told.samples["tokens"] == (0 if num_threads else 9)
        go_on.set()
    assert told.samples == {"frames": 3, "tokens": 9}
    assert all(seconds > 0 for seconds in told.seconds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu_is_told_when_the_gpu_is_done() -> None:
    device = torch.device("cuda")
    told = Told()
    encoders = CosmosTokenizer.from_pretrained("tiny-cosmos", device=device), T5TextEncoder.from_pretrained("tiny-t5")
    with BatchEncoder(*encoders, 0, on_done=told) as encoder:
        for _ in range(3):
            encoder.encode_frames(pictures(4), BatchRecord())
    assert told.samples == {"frames": 12}
    assert all(0 < seconds < 60 for seconds in told.seconds)
