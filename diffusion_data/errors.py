"""Two kinds of trouble: what the user can mend (`UserError`), and rows that can't be used (`RowRejected`)."""

from __future__ import annotations

from enum import Enum


class UserError(Exception):
    """Something the user can act on. Entry points print its message as one line, without a traceback."""


class Reason(str, Enum):
    """Why a row was rejected: the fixed vocabulary of the ledger and of rejected.jsonl."""

    damaged_source = "damaged_source"
    null_media = "null_media"
    empty = "empty"
    not_found = "not_found"
    forbidden_path = "forbidden_path"
    forbidden_url = "forbidden_url"
    fetch_error = "fetch_error"
    timeout = "timeout"
    not_media = "not_media"
    unsupported_format = "unsupported_format"
    truncated = "truncated"
    decode_error = "decode_error"
    no_frames = "no_frames"
    too_few_frames = "too_few_frames"
    too_small = "too_small"
    too_large = "too_large"
    bad_aspect = "bad_aspect"
    null_caption = "null_caption"
    caption_not_text = "caption_not_text"
    bad_metadata = "bad_metadata"
    non_finite_latent = "non_finite_latent"
    process_func_error = "process_func_error"
    worker_killed = "worker_killed"

    @property
    def retryable(self) -> bool:
        """True if the same row may succeed later: the fault lay in the network, not in the row."""
        return self in (Reason.fetch_error, Reason.timeout)


class RowRejected(Exception):
    """One row can't become a sample; raised by process functions and media loading, kept in the ledger."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that it pickles between processes
        self.reason = Reason(reason)
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.message}"
