"""T5TextEncoder: true lengths, embeddings that padding doesn't change, and errors that say what to do."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_data.assets import bundled
from diffusion_data.errors import UserError
from diffusion_data.t5_text_encoder import T5TextEncoder
from tests.fake_hub import running_hub

END = 1
CAPTIONS = [
    "a red circle on the left",
    "",
    "a green square moves from left to right over a grey background, and a blue star stays still",
    "a cat",
]


@pytest.fixture(scope="module")
def encoder() -> T5TextEncoder:
    return T5TextEncoder.from_pretrained("tiny-t5")


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = bundled("tiny-t5")
    assert folder is not None
    return Path(shutil.copytree(folder, tmp_path / "t5"))


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_known_words_are_one_token_and_the_end_is_counted(encoder: T5TextEncoder) -> None:
    (token_ids,) = encoder.tokenize(["a red circle"])
    assert len(token_ids) == 4
    assert token_ids[-1] == END


def test_any_caption_becomes_tokens(encoder: T5TextEncoder) -> None:
    captions = ["Quixotic zebras!", "日本の海", " \n\t ", "👩‍🚀", "a\x00b", "</s>"]
    for token_ids in encoder.tokenize(captions):
        assert token_ids[-1] == END
    assert all(np.isfinite(embedding).all() for embedding in encoder.encode(captions))


def test_empty_caption_is_its_end_token(encoder: T5TextEncoder) -> None:
    assert encoder.tokenize([""]) == [[END]]
    (embedding,) = encoder.encode([""])
    assert embedding.shape == (1, 1024)


def test_no_captions_give_nothing(encoder: T5TextEncoder) -> None:
    assert encoder.tokenize([]) == []
    assert encoder.encode_tokens([]) == []
    assert encoder.encode([]) == []


def test_embeddings_have_true_lengths_in_order(encoder: T5TextEncoder) -> None:
    token_ids = encoder.tokenize(CAPTIONS)
    embeddings = encoder.encode_tokens(token_ids)
    assert [tuple(each.shape) for each in embeddings] == [(len(ids), 1024) for ids in token_ids]
    assert {each.dtype for each in embeddings} == {torch.float16}
    assert encoder.embedding_dim == 1024
    assert encoder.dtype == torch.float32


def test_encode_gives_float16_arrays_that_own_their_memory(encoder: T5TextEncoder) -> None:
    for embedding in encoder.encode(CAPTIONS):
        assert embedding.dtype == np.float16
        assert embedding.base is None  # a view would keep, and pickle, nothing of its neighbours


def test_a_caption_is_the_same_alone_and_beside_longer_ones(encoder: T5TextEncoder) -> None:
    token_ids = encoder.tokenize(CAPTIONS)
    network = encoder._model
    with torch.inference_mode():
        together = encoder.encode_tokens(token_ids)
        for ids, batched in zip(token_ids, together, strict=True):
            ones = torch.ones(1, len(ids), dtype=torch.long)
            alone = network(input_ids=torch.tensor([ids]), attention_mask=ones).last_hidden_state[0]
            (ours,) = encoder.encode_tokens([ids])
            torch.testing.assert_close(ours, alone.half(), atol=0, rtol=0)
            torch.testing.assert_close(batched, ours, atol=2**-9, rtol=0)  # float16's step below 4


def test_padding_changes_nothing_before_rounding(encoder: T5TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[torch.Tensor] = []
    hook = encoder._model.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
    token_ids = encoder.tokenize(CAPTIONS)
    try:
        encoder.encode_tokens(token_ids)
        for ids in token_ids:
            encoder.encode_tokens([ids])
    finally:
        hook.remove()
    together, *alone = hidden
    for row, ids, each in zip(together, token_ids, alone, strict=True):
        torch.testing.assert_close(row[: len(ids)], each[0], atol=1e-5, rtol=0)


def test_pads_only_to_the_longest_and_always_masks(encoder: T5TextEncoder) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    hook = encoder._model.register_forward_pre_hook(lambda _, __, arguments: seen.append(arguments), with_kwargs=True)
    try:
        encoder.encode_tokens([[5, END], [5, 6, 7, END]])
        encoder.encode_tokens([[5, 6, END]])
    finally:
        hook.remove()
    assert seen[0]["input_ids"].tolist() == [[5, END, 0, 0], [5, 6, 7, END]]
    assert seen[0]["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert seen[1]["attention_mask"].tolist() == [[1, 1, 1]]


def test_different_words_and_neighbours_give_different_embeddings(encoder: T5TextEncoder) -> None:
    def directions(caption: str) -> np.ndarray:
        embedding = encoder.encode([caption])[0].astype(np.float32)
        return embedding / np.linalg.norm(embedding, axis=-1, keepdims=True)

    red_circle, blue_circle, red_square = map(directions, ("red circle", "blue circle", "red square"))
    assert red_circle[0] @ blue_circle[0] < 0.6
    assert 0.6 < red_circle[0] @ red_square[0] < 0.97


def test_long_captions_are_cut_with_their_end_token_and_can_be_counted(encoder: T5TextEncoder) -> None:
    short = T5TextEncoder.from_pretrained("tiny-t5", max_length=4)
    captions = ["a red", "a red circle", "a red circle on the left", "red " * 1000]
    uncut = short.tokenize_uncut(captions)
    assert [len(ids) for ids in uncut] == [3, 4, 7, 1001]
    assert sum(len(ids) > short.max_length for ids in uncut) == 2
    assert short.tokenize(captions) == [short.cut(ids) for ids in uncut]
    assert short.tokenize(captions)[:2] == uncut[:2]
    assert short.tokenize(captions)[2] == [*uncut[2][:3], END]
    assert [len(each) for each in short.encode(captions)] == [3, 4, 4, 4]
    with pytest.raises(ValueError, match=r"expected 1 to 4 tokens a caption, got 3 to 1001"):
        short.encode_tokens(uncut)


def test_files_for_the_fingerprint_are_all_that_decide_embeddings(encoder: T5TextEncoder) -> None:
    names = [path.name for path in encoder.weight_files]
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert all(path.is_file() for path in encoder.weight_files)


def test_loads_a_folder_with_older_or_sharded_weights(encoder: T5TextEncoder, model_folder: Path) -> None:
    expected = encoder.encode(CAPTIONS)
    tensors = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()

    torch.save(tensors, model_folder / "pytorch_model.bin")
    older = T5TextEncoder.from_pretrained(model_folder)
    assert "pytorch_model.bin" in [path.name for path in older.weight_files]
    (model_folder / "pytorch_model.bin").unlink()

    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    where = {key: files[index % 2] for index, key in enumerate(sorted(tensors))}
    for file in files:
        part = {key: tensors[key] for key in where if where[key] == file}
        save_file(part, model_folder / file, metadata={"format": "pt"})
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    sharded = T5TextEncoder.from_pretrained(str(model_folder))
    assert set(files) < {path.name for path in sharded.weight_files}

    for loaded in (older, sharded):
        for ours, theirs in zip(loaded.encode(CAPTIONS), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    (model_folder / files[1]).unlink()
    with pytest.raises(UserError, match=rf"model.safetensors.index.json in .* lacks {files[1]}"):
        T5TextEncoder.from_pretrained(model_folder)


@pytest.mark.parametrize(
    ("file", "looked_for"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json or spiece.model"),
        ("model.safetensors", "has no model.safetensors or .* or pytorch_model.bin or "),
    ],
)
def test_says_which_files_a_folder_lacks(model_folder: Path, file: str, looked_for: str) -> None:
    (model_folder / file).unlink()
    with pytest.raises(UserError, match=looked_for) as caught:
        T5TextEncoder.from_pretrained(model_folder)
    assert str(model_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny-t6", "/no/such/t5", "./t5", "a/b/c"])
def test_says_what_a_name_can_be(name: str) -> None:
    with pytest.raises(UserError, match=r"not a folder here.*tiny-t5.*google-t5/t5-11b"):
        T5TextEncoder.from_pretrained(name)


def test_fetches_one_format_of_the_weights(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(load_file(model_folder / "model.safetensors"), model_folder / "pytorch_model.bin")
    (model_folder / "tf_model.h5").write_bytes(b"of no use")
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.add("some/t5", model_folder)
        T5TextEncoder.from_pretrained("some/t5", cache_dir=tmp_path / "mine")
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(hub.downloaded)
        assert not {"pytorch_model.bin", "tf_model.h5"} & set(hub.downloaded)
        assert (tmp_path / "mine").is_dir()

        (model_folder / "model.safetensors").unlink()
        hub.add("google-t5/t5-11b", model_folder)
        T5TextEncoder.from_pretrained("t5-11b")
        assert "pytorch_model.bin" in hub.downloaded


def test_a_cached_model_needs_no_network_and_stays_what_it_is(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.add("some/t5", model_folder)
        first = T5TextEncoder.from_pretrained("some/t5").weight_files
        rewrite_config(model_folder, something="new")
        hub.add("some/t5", model_folder)
        hub.requests.clear()
        assert T5TextEncoder.from_pretrained("some/t5").weight_files == first
        assert hub.requests == []


def test_a_shard_that_the_cache_lacks_is_fetched(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = "model-00001-of-00001.safetensors"
    weights = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").rename(model_folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.add("some/t5", model_folder)
        weight_files = T5TextEncoder.from_pretrained("some/t5").weight_files
        next(file for file in weight_files if file.name == shard).unlink()
        assert T5TextEncoder.from_pretrained("some/t5").weight_files == weight_files


def test_a_repository_without_a_text_encoder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        r"no text encoder in http.*/some/t5: looked for config.json, and tokenizer.json or spiece.model, and "
        r"model.safetensors or .* or pytorch_model.bin or "
    )
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["some/t5"] = {"config.json": b"{}"}
        with pytest.raises(UserError, match=expected):
            T5TextEncoder.from_pretrained("some/t5")


def test_refuses_weights_that_do_not_fit(model_folder: Path) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    norm = "encoder.final_layer_norm.weight"

    rewrite_weights(model_folder, {key: value for key, value in tensors.items() if key != norm})
    with pytest.raises(UserError, match=f"1 tensors are missing or of another shape, {norm} among"):
        T5TextEncoder.from_pretrained(model_folder)

    rewrite_weights(model_folder, {**tensors, norm: torch.ones(7)})
    with pytest.raises(UserError, match=f"1 tensors are missing or of another shape, {norm} among"):
        T5TextEncoder.from_pretrained(model_folder)

    content = (bundled("tiny-t5") / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="can't load the text encoder"):
        T5TextEncoder.from_pretrained(model_folder)


def test_refuses_another_kind_of_model(model_folder: Path) -> None:
    rewrite_config(model_folder, model_type="bert")
    with pytest.raises(UserError, match="is of model_type 'bert', not 't5'"):
        T5TextEncoder.from_pretrained(model_folder)


def test_names_the_package_that_an_older_tokenizer_needs(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_folder / "tokenizer.json").rename(model_folder / "spiece.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"has only spiece\.model.*pip install sentencepiece"):
        T5TextEncoder.from_pretrained(model_folder)


def test_refuses_a_tokenizer_larger_than_the_network(model_folder: Path) -> None:
    rewrite_config(model_folder, vocab_size=100)
    tensors = load_file(model_folder / "model.safetensors")
    rewrite_weights(model_folder, {**tensors, "shared.weight": tensors["shared.weight"][:100].clone()})
    with pytest.raises(UserError, match="has 210 tokens, the network 100"):
        T5TextEncoder.from_pretrained(model_folder)


class _RunsCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


def test_loading_weights_runs_no_code(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (model_folder / "model.safetensors").unlink()
    torch.save({"shared.weight": _RunsCode()}, model_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds more than tensors"):
        T5TextEncoder.from_pretrained(model_folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("factor", [1e5, float("nan")])
def test_refuses_embeddings_that_float16_cannot_hold(model_folder: Path, factor: float) -> None:
    tensors = load_file(model_folder / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] *= factor
    rewrite_weights(model_folder, tensors)
    encoder = T5TextEncoder.from_pretrained(model_folder)
    with pytest.raises(UserError, match="not finite in float16"):
        encoder.encode(["a red circle"])


def test_refuses_settings_that_cannot_work() -> None:
    with pytest.raises(UserError, match="max_length is 0"):
        T5TextEncoder.from_pretrained("tiny-t5", max_length=0)
    with pytest.raises(UserError, match="T5 overflows in float16"):
        T5TextEncoder.from_pretrained("tiny-t5", dtype=torch.float16)


def test_bfloat16_is_close_to_float32(encoder: T5TextEncoder) -> None:
    half = T5TextEncoder.from_pretrained("tiny-t5", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for ours, exact in zip(half.encode(CAPTIONS), encoder.encode(CAPTIONS), strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), exact, atol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_in_bfloat16_and_agrees_with_the_cpu(encoder: T5TextEncoder) -> None:
    on_cuda = T5TextEncoder.from_pretrained("tiny-t5", device="cuda")
    assert on_cuda.dtype == torch.bfloat16
    embeddings = on_cuda.encode_tokens(on_cuda.tokenize(CAPTIONS))
    assert {each.device.type for each in embeddings} == {"cuda"}
    for ours, exact in zip(embeddings, encoder.encode(CAPTIONS), strict=True):
        np.testing.assert_allclose(ours.float().cpu().numpy(), exact, atol=0.05)
