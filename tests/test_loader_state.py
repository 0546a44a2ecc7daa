import io

import numpy as np
import pytest
import torch
from megatron.energon.rng import SystemRng
from megatron.energon.savable_loader import SavableDataLoaderState
from megatron.energon.state import FlexState

from diffusion_data.errors import UserError
from diffusion_data.loader_state import from_plain, refuse_changes, refuse_foreign, to_plain


def through_a_checkpoint(plain):
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_survives_a_weights_only_checkpoint():
    inner = FlexState(rng=b"bytes", keys=[("Webdataset", 3), None], nested=FlexState(index=1), plain={1: 2.5})
    state = SavableDataLoaderState(worker_states=[inner], next_worker_id=1, micro_batch_size=2)

    restored = from_plain(through_a_checkpoint(to_plain(state)))

    assert isinstance(restored, SavableDataLoaderState)
    assert restored.next_worker_id == 1
    assert restored.micro_batch_size == 2
    assert isinstance(restored.worker_states[0], FlexState)
    assert isinstance(restored.worker_states[0]["nested"], FlexState)
    assert not isinstance(restored.worker_states[0]["plain"], FlexState)
    assert restored.worker_states[0] == inner


def test_the_random_generators_state_survives():
    SystemRng.seed(5)
    state = SystemRng.save_state()
    expected = (torch.rand(3), np.random.rand(3))

    SystemRng.restore_state(from_plain(through_a_checkpoint(to_plain(state))))

    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_unsigned_arrays_keep_their_values():
    array = np.array([0, 2**32 - 1], dtype=np.uint32)
    restored = from_plain(to_plain(array))
    assert restored.dtype == np.uint32
    assert restored.tolist() == array.tolist()


def test_what_can_not_be_saved_is_an_error():
    with pytest.raises(TypeError, match="can't save"):
        to_plain(object())


def test_only_energons_state_classes_are_restored():
    with pytest.raises(KeyError):
        from_plain({"class": "Popen", "fields": {"args": "true"}})


def test_changed_settings_are_refused_by_name():
    saved = {"num_workers": 2, "micro_batch_size": 1, "seed": 0}
    refuse_changes(saved, dict(saved))
    with pytest.raises(UserError, match="micro_batch_size was 1, now 4; num_workers was 2, now 0"):
        refuse_changes(saved, {"num_workers": 0, "micro_batch_size": 4, "seed": 0})


def test_a_state_that_another_datamodule_saved_is_refused():
    fields = {"batches_done", "settings"}
    refuse_foreign({"batches_done": 1, "settings": {}}, fields, "DiffusionDataModule")
    nemos = {"dataloader_state": [], "consumed_samples": 8}
    with pytest.raises(UserError, match=r"this DiffusionDataModule saved \(it holds: consumed_samples, dataloader_st"):
        refuse_foreign(nemos, fields, "DiffusionDataModule")
    for other in ([1], {"batches_done": 1}, {"batches_done": 1, "settings": 3}, {"ranks": [], **dict.fromkeys(fields)}):
        with pytest.raises(UserError, match="load its weights"):
            refuse_foreign(other, fields, "DiffusionDataModule")
