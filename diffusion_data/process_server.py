"""A clean process that others are forked from: Python's forkserver, with the slow imports done beforehand.

A rank holds CUDA and threads, so it must not be forked, and a new interpreter takes seconds to import what
a worker needs. The server is started early and imports while the rank loads its models.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

_PRELOADED = ["diffusion_data.decode_workers", "megatron.energon"]


def start_process_server() -> None:
    """Start importing now; without this, the first process that is asked for waits for it."""
    process_context()
    forkserver.ensure_running()


def process_context() -> ForkServerContext:
    """What starts processes that are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
