"""Decoded rows -> samples: which batches are formed, what is let go, and what a bad result becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_data.batching import Budgets
from diffusion_data.cosmos_tokenizer import CosmosTokenizer
from diffusion_data.decoded_row import DecodedRow, DecodedSample, RejectedRow
from diffusion_data.encode_pipeline import EncodedRow, EncodedShard, EncodePipeline, batches_by_length
from diffusion_data.errors import Reason
from diffusion_data.latent_sample import LatentSample
from diffusion_data.shard_plan import Shard
from diffusion_data.t5_text_encoder import T5TextEncoder

SHARD = Shard(number=0, start=0, stop=100)


@pytest.fixture(scope="module")
def tokenizer() -> CosmosTokenizer:
    return CosmosTokenizer.from_pretrained("tiny-cosmos", decoder=False)


@pytest.fixture(scope="module")
def text_encoder() -> T5TextEncoder:
    return T5TextEncoder.from_pretrained("tiny-t5")


def samples_of(shard: EncodedShard) -> list[LatentSample | RejectedRow]:
    """Of all rows; a rejected one is itself."""
    return [each for row in shard.rows() for each in ([row] if isinstance(row, RejectedRow) else row.samples)]


def decoded(row: int, height: int = 32, width: int = 32, frames: int = 1, caption: str = "a circle") -> DecodedRow:
    pixels = np.random.default_rng(row).integers(0, 256, (frames, height, width, 3), np.uint8)
    return DecodedRow(
        row=row,
        source_file="a.parquet",
        source_row=row,
        samples=(
            DecodedSample(
                pixels=pixels,
                framerate=None if frames == 1 else 8.0,
                image_height=height,
                image_width=width,
                caption=caption,
                metadata={},
            ),
        ),
    )


class Recorder:
    """Stands before an encoder's method and notes the sizes of the batches that pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoder: object, method: str) -> None:
        self.batches: list[tuple[int, ...]] = []
        original = getattr(encoder, method)

        def record(batch: object) -> object:
            shape = batch.shape if isinstance(batch, torch.Tensor) else [len(each) for each in batch]  # type: ignore[attr-defined]
            self.batches.append(tuple(shape))
            return original(batch)

        monkeypatch.setattr(encoder, method, record)


def one_shard(shards: Iterator[EncodedShard]) -> EncodedShard:
    (shard,) = shards
    return shard


def test_lengths_are_batched_in_order_up_to_the_budget_of_padded_tokens() -> None:
    assert list(batches_by_length([5, 1, 3, 2, 9], budget=8)) == [[1, 3], [2], [0], [4]]
    assert list(batches_by_length([2, 2, 2, 2], budget=8)) == [[0, 1, 2, 3]]
    assert list(batches_by_length([], budget=8)) == []


def test_equal_shapes_are_encoded_together_up_to_the_pixel_budget(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder(monkeypatch, tokenizer, "encode")
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=3 * 32 * 32, tokens=4096))
    rows = [decoded(0), decoded(1, width=48), decoded(2), decoded(3), decoded(4), decoded(5, frames=5)]
    samples_of(one_shard(pipeline.run((SHARD, row) for row in rows)))
    assert seen.batches == [
        (3, 1, 32, 32, 3),
        (1, 5, 32, 32, 3),  # larger than the budget: a batch of its own
        (1, 1, 32, 48, 3),
        (1, 1, 32, 32, 3),
    ]


def test_pictures_waiting_for_company_are_bounded(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder(monkeypatch, tokenizer, "encode")
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=2 * 32 * 96, tokens=4096))
    waiting: list[int] = []

    def rows() -> Iterator[tuple[Shard, DecodedRow]]:
        for row in range(24):
            yield SHARD, decoded(row, height=16 * (1 + row % 6), width=16 * (1 + row // 6 % 4))
            waiting.append(sum(batch[0] for batch in seen.batches))

    samples_of(one_shard(pipeline.run(rows())))
    assert waiting[-1] > 0  # some were encoded before the end, though no shape had a full batch
    assert sum(batch[0] for batch in seen.batches) == 24


def test_a_caption_is_encoded_once_a_shard_and_in_batches_of_similar_length(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder(monkeypatch, text_encoder, "encode_tokens")
    told: Counter[str] = Counter()
    pipeline = EncodePipeline(
        tokenizer,
        text_encoder,
        Budgets(pixels=2 * 512 * 512, tokens=12),
        on_done=lambda kind, num_samples, seconds: told.update({kind: num_samples}),
    )
    captions = ["red", "red circle", "red", "red circle on the left of a blue background", "red circle"]
    rows = [decoded(row, caption=caption) for row, caption in enumerate(captions)]
    samples = samples_of(one_shard(pipeline.run((SHARD, row) for row in rows)))
    lengths = [len(text_encoder.tokenize([caption])[0]) for caption in captions]
    assert seen.batches == [(lengths[0], lengths[1]), (lengths[3],)]
    assert told == {"frames": 5, "tokens": 5}
    for sample, caption in zip(samples, captions, strict=True):
        assert isinstance(sample, LatentSample)
        alone = text_encoder.encode([caption])[0]
        np.testing.assert_allclose(sample.text_embedding, alone, atol=2e-3)


def test_shards_come_out_one_by_one_in_row_order_with_their_rejects(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder
) -> None:
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=2 * 512 * 512, tokens=4096))
    bad = RejectedRow(row=1, source_file="a", source_row=1, reason=Reason.not_found, message="gone")
    other = Shard(number=1, start=3, stop=5)
    rows = [(SHARD, decoded(0)), (SHARD, bad), (SHARD, decoded(2, width=48)), (other, decoded(3)), (other, decoded(4))]
    shards = list(pipeline.run(rows))
    assert [shard.shard.number for shard in shards] == [0, 1]
    results = [samples_of(shard) for shard in shards]
    assert [getattr(result, "key", "rejected") for result in results[0]] == [
        "samples/sample_000000000",
        "rejected",
        "samples/sample_000000002",
    ]
    assert [result.key for result in results[1] if isinstance(result, LatentSample)] == [
        "samples/sample_000000003",
        "samples/sample_000000004",
    ]


def test_a_latent_that_is_not_finite_rejects_its_row_alone(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tokenizer.encode

    @torch.inference_mode()
    def spoil_second(frames: torch.Tensor) -> torch.Tensor:
        latents = original(frames).clone()
        latents[1, 3, 0, 1, 1] = float("nan")
        return latents

    monkeypatch.setattr(tokenizer, "encode", spoil_second)
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=2 * 512 * 512, tokens=4096))
    results = samples_of(one_shard(pipeline.run((SHARD, decoded(row)) for row in range(3))))
    assert [isinstance(result, LatentSample) for result in results] == [True, False, True]
    assert isinstance(results[1], RejectedRow)
    assert results[1].reason is Reason.non_finite_latent


def several(row: int, *sizes: int) -> DecodedRow:
    """A row of samples of these widths."""
    singles = [decoded(10 * row + number, width=width) for number, width in enumerate(sizes)]
    return replace(singles[0], row=row, samples=tuple(single.samples[0] for single in singles))


def test_samples_of_a_row_are_batched_with_those_of_others_and_come_out_together(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Recorder(monkeypatch, tokenizer, "encode")
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=2 * 512 * 512, tokens=4096))
    rows = [several(0, 32, 48, 32), decoded(1), several(2, 48)]
    (shard,) = pipeline.run((SHARD, row) for row in rows)
    assert sorted(seen.batches) == [(2, 1, 32, 48, 3), (3, 1, 32, 32, 3)]
    keys = [[sample.key for sample in row.samples] for row in shard.rows() if isinstance(row, EncodedRow)]
    assert keys == [
        ["samples/sample_000000000_000", "samples/sample_000000000_001", "samples/sample_000000000_002"],
        ["samples/sample_000000001"],
        ["samples/sample_000000002"],
    ]
    alone = samples_of(one_shard(pipeline.run([(SHARD, decoded(1))])))
    together = samples_of(shard)[3]
    assert isinstance(together, LatentSample)
    assert isinstance(alone[0], LatentSample)
    torch.testing.assert_close(together.latent.float(), alone[0].latent.float(), atol=0.02, rtol=0.02)


def test_a_sample_that_is_not_finite_rejects_its_whole_row(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tokenizer.encode

    @torch.inference_mode()
    def spoil_wide(frames: torch.Tensor) -> torch.Tensor:
        latents = original(frames).clone()
        return latents * float("nan") if frames.shape[3] == 48 else latents

    monkeypatch.setattr(tokenizer, "encode", spoil_wide)
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=2 * 512 * 512, tokens=4096))
    rows = [several(0, 32, 32), several(1, 32, 48), decoded(2)]
    kinds = [type(row) for row in one_shard(pipeline.run((SHARD, row) for row in rows)).rows()]
    assert kinds == [EncodedRow, RejectedRow, EncodedRow]


def test_only_full_batches_are_compiled(
    tokenizer: CosmosTokenizer, text_encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest comes in too many sizes. Which are full follows from the rows and the budget alone."""
    monkeypatch.setattr(tokenizer, "encode_compiled", tokenizer.encode)  # compiling takes a minute
    compiled = Recorder(monkeypatch, tokenizer, "encode_compiled")
    plain = Recorder(monkeypatch, tokenizer, "encode")
    pipeline = EncodePipeline(tokenizer, text_encoder, Budgets(pixels=3 * 32 * 32, tokens=4096), compiled=True)
    rows = [*(decoded(row) for row in range(5)), decoded(5, width=48)]
    samples_of(one_shard(pipeline.run((SHARD, row) for row in rows)))
    assert compiled.batches == [(3, 1, 32, 32, 3)]
    assert sorted(plain.batches) == [(1, 1, 32, 48, 3), (2, 1, 32, 32, 3)]
