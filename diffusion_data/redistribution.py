"""A checkpoint's place in the dataset, on another number of ranks with as many workers in total.

Which samples a worker reads depends on its number among all workers alone, so each goes on where it was, on whatever
rank it is now; energon's `checkpoint redist` does the same.
"""

from __future__ import annotations

from typing import Any

from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint

from diffusion_data.loader_state import from_plain, refuse_changes

_RANKS, _WORKERS, _EPOCH_LENGTH = "data_parallel_size", "num_workers", "virtual_epoch_length"
_MAY_CHANGE = ". (Ranks and workers a rank may change if their product, at least 1, stays the same)"


def fitted_state(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What the datamodule's `state_dict` gave, as energon restores it, for a stream with the settings `now`.

    Raises:
        UserError: it is another stream, naming each setting that differs.
    """
    before = saved["settings"]
    if _can_be_redistributed(before, now):
        refuse_changes(_settings_to_compare(before), _settings_to_compare(now), _MAY_CHANGE)
        return _redistributed(saved, now)
    refuse_changes(before, now, _MAY_CHANGE)
    return {**saved, "ranks": [from_plain(state) for state in saved["ranks"]]}


def _can_be_redistributed(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """True if there are as many workers in total, on another number of ranks."""
    workers = before.get(_RANKS, 0) * before.get(_WORKERS, 0)
    return before.get(_RANKS) != now[_RANKS] and workers > 0 and workers == now[_RANKS] * now[_WORKERS]


def _settings_to_compare(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in (_RANKS, _WORKERS, _EPOCH_LENGTH)}


def _redistributed(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    before = saved["settings"]
    states = [from_plain(state) for state in saved["ranks"]]
    batch_sizes = [state.micro_batch_size for state in states if state is not None]
    at_start = [SavableDatasetCheckpoint(state=None, offset=0)] * before[_WORKERS]
    workers = [worker for state in states for worker in (at_start if state is None else state.worker_states)]
    share = now[_WORKERS]
    ranks = [
        SavableDataLoaderState(
            worker_states=workers[rank * share : (rank + 1) * share],
            next_worker_id=0,
            micro_batch_size=batch_sizes[0],
        )
        if batch_sizes
        else None
        for rank in range(now[_RANKS])
    ]
    done = saved["batches_done"] * before[_RANKS] // now[_RANKS] % now[_EPOCH_LENGTH]
    return {"ranks": ranks, "batches_done": done, "settings": now}


def rescale_batches(trainer: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Make Lightning, which goes on from a checkpoint of another number of ranks, count batches as these ranks do.

    It counts a rank's batches to know when a step of the optimizer is whole and when to validate.
    """
    if trainer is None or before[_RANKS] == now[_RANKS] or not trainer.fit_loop.restarting:
        return
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (progress.total, progress.current):
        more = counts.ready * before[_RANKS] // now[_RANKS] - counts.ready
        for name in ("ready", "started", "processed", "completed"):  # that differ by one within a batch, and stay so
            setattr(counts, name, getattr(counts, name) + more)
