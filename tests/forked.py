"""Runs in processes of their own, which a server forks that has imported everything once: they start at once.

A process that is started anew spends seconds on its imports, several times those of a tiny run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

#: Imported by the server, before the first of them is asked for.
_BEFOREHAND = ["torch", "retort.config", "retort.train.runner", "transformers.models.qwen3.modeling_qwen3"]


def killed(settings: Mapping[str, Any], folder: Path, step: int | None) -> int:
    """Starts a run in another process, which kills itself by SIGKILL after a step; its exit code.

    Args:
        settings: The run's.
        folder: Its folder.
        step: The step; None where something else is to kill it.
    """
    process = server().Process(target=_run, args=(dict(settings), str(folder), step, os.getcwd()))
    process.start()
    process.join(600)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    return process.exitcode


def server() -> ForkServerContext:
    """The context of processes that are forked from the server, which is started with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_BEFOREHAND)
    return context


def _run(settings: dict[str, Any], folder: str, step: int | None, here: str) -> None:
    os.chdir(here)
    import torch

    from retort import config
    from retort.train import runner
    from retort.train.events.observe import Silent

    class Killer(Silent):
        def step(self, number: int, steps: int, metrics: object) -> None:
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    runner.start(config.resolve(settings), Path(folder), Killer()).go()
