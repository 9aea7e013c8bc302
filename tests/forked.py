"""Runs in processes of their own, which a server forks that has imported everything once: they start at once.

A process that is started anew spends seconds on its imports, several times those of a tiny run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

#: Imported by the server, before the first of them is asked for.
_BEFOREHAND = ["torch", "retort.config", "retort.train.runner", "transformers.models.qwen3.modeling_qwen3"]
_BEFOREHAND += ["retort.cli", "retort.serve.app", "retort.serve.scorer", "uvicorn"]


def killed(settings: Mapping[str, Any], folder: Path, step: int | None) -> int:
    """Starts a run in another process, which kills itself by SIGKILL after a step; its exit code.

    Args:
        settings: The run's.
        folder: Its folder.
        step: The step; None where something else is to kill it.
    """
    process = started(_run, dict(settings), folder, step)
    process.join(600)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    return process.exitcode


def started(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that calls a function of a module, with this one's environment and folder; it ends with this one."""
    process = server().Process(target=_called, args=(function, arguments, dict(os.environ), os.getcwd()), daemon=True)
    process.start()
    return process


def command(words: Sequence[str], errors: Path) -> BaseProcess:
    """A process that does what `retort` does with these words; its standard error goes into a file."""
    return started(_commanded, list(words), errors)


def server() -> ForkServerContext:
    """The context of processes that are forked from the server, which is started with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_BEFOREHAND)
    return context


def _called(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], here: str) -> None:
    os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def _commanded(words: list[str], errors: Path) -> None:
    from retort.cli import main

    # What nohup has told the tests to ignore, a run would ignore, too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, path in ((1, Path(os.devnull)), (2, errors)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.exit(main(words))


def _run(settings: dict[str, Any], folder: Path, step: int | None) -> None:
    import torch

    from retort import config
    from retort.train import runner
    from retort.train.events.observe import Silent

    class Killer(Silent):
        def step(self, number: int, steps: int, metrics: object) -> None:
            if number == step:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    runner.start(config.resolve(settings), folder, Killer()).go()
