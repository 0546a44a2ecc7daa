"""A model's files: from the cache, else from the hub, only those needed; or one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_data.errors import UserError
from diffusion_data.hub_files import WantedFiles, model_folder
from tests.fake_hub import FakeHub, running_hub

WANTED = WantedFiles(
    kind="model",
    looked_for="looked for weights and config",
    choose=lambda names: [name for name in ("config", "sub/weights") if name in names],
    is_complete=lambda folder: (folder / "config").is_file() and (folder / "sub/weights").is_file(),
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.repos["some/model"] = {"config": b"1", "sub/weights": b"first", "other/weights": b"large"}
        yield hub


def test_only_the_files_needed_are_fetched(hub: FakeHub) -> None:
    folder = model_folder("some/model", WANTED)
    assert (folder / "sub/weights").read_bytes() == b"first"
    assert sorted(hub.downloaded) == ["config", "sub/weights"]


def test_what_is_in_the_cache_is_taken_without_asking_even_when_the_hub_has_newer(hub: FakeHub, tmp_path: Path) -> None:
    first = model_folder("some/model", WANTED, tmp_path / "mine")
    hub.repos["some/model"]["sub/weights"] = b"second"
    hub.requests.clear()
    assert model_folder("some/model", WANTED, tmp_path / "mine") == first
    assert hub.requests == []
    assert (model_folder("some/model", WANTED) / "sub/weights").read_bytes() == b"second"  # another cache


def test_an_interrupted_download_is_finished(hub: FakeHub) -> None:
    (model_folder("some/model", WANTED) / "sub/weights").unlink()
    hub.downloaded.clear()
    assert (model_folder("some/model", WANTED) / "sub/weights").read_bytes() == b"first"
    assert "config" not in hub.downloaded


def message(repo: str) -> str:
    with pytest.raises(UserError) as raised:
        model_folder(repo, WANTED)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_repository_of_something_else_is_told_with_what_was_looked_for(hub: FakeHub) -> None:
    hub.repos["some/data"] = {"readme": b""}
    hub.repos["some/half"] = {"config": b"1"}
    for repo in ("some/data", "some/half"):
        assert message(repo).startswith("no model in http://127.0.0.1:")
        assert message(repo).endswith(f"/{repo}: looked for weights and config")


def test_a_name_that_is_not_there_is_told(hub: FakeHub) -> None:
    assert message("no/such").startswith("no such model: no/such is neither a folder nor on the hub (http://127.0.0.1")
    assert message("no/such").endswith("a private one needs hf auth login, or HF_TOKEN); looked for weights and config")
    assert message("no/such..name") == "model 'no/such..name' is neither a folder nor a possible name on the hub"


def test_a_locked_repository_is_told_with_the_page_that_unlocks_it(hub: FakeHub) -> None:
    hub.refuses["some/model"] = (403, "GatedRepo")
    assert message("some/model").startswith("model some/model is locked: accept its terms at http://127.0.0.1")


def test_a_hub_that_fails_is_told_with_the_cause_and_the_ways_out(hub: FakeHub) -> None:
    hub.refuses["some/model"] = (418, "")
    assert message("some/model").startswith("can't fetch the model some/model from the hub (")
    assert "418" in message("some/model")


def test_without_network_the_ways_out_are_told(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    told = message("some/model")
    assert told.startswith("can't fetch the model some/model from the hub (ConnectError: ")
    assert "check the network, or give a folder that has its files, or a cache_dir that has them already" in told
    assert told.endswith("looked for weights and config")
