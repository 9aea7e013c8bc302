"""An engine in this process with weights of its own that follow the student's, and runs that write with it."""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.hf import HFEngine

#: Settings of a run that writes with it: those of any engine that is not the model that learns.
SETTINGS = {"engine": "vllm", "vllm_python": "python"}


class FollowingHere:
    """Generates with a copy of a model, which gets the weights that were kept of it.

    Attributes:
        wrote: The versions of the weights of each call, with the thread that made it.
        before: Called before a batch is written, with its number from 0; it may wait, or raise.
        between: Called before a completion is told, with its place; the last is told first.
    """

    name = "a copy"
    noise_floor = math.nan
    image_tokens = None

    def __init__(self, lm: LanguageModel, vocab: int, newest: Callable[[], int]) -> None:
        self.lm, self.newest, self.vocab = lm, newest, vocab
        self.own: HFEngine | None = None
        self.version = -1
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.lock = threading.Lock()
        self.wrote: list[tuple[int, str]] = []
        self.before: Callable[[int], None] = lambda number: None
        self.between: Callable[[int], None] = lambda place: None
        self.closed = self.waits = False

    @property
    def tokenizer(self) -> Any:
        return self.lm.tokenizer

    @property
    def context(self) -> int:
        return self.lm.context

    def open(self, folder: Path) -> None:
        self.closed = self.waits = False

    def keep(self, version: int) -> None:
        assert threading.current_thread() is threading.main_thread(), "the model may learn meanwhile"
        self.waits = True
        if version == self.version or version in self.kept:
            return
        with self.lock:
            self.kept[version] = self.copied()

    def copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.lm.model.state_dict().items()}

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        assert weights is None
        if version == self.version:
            return
        if self.own is None:
            self.own = HFEngine(copy.deepcopy(self.lm), vocab=self.vocab, max_parallel=8)
        if version not in self.kept:
            assert not self.waits, "nobody has kept these weights"
            self.kept[version] = self.copied()
        with self.lock:
            self.own.lm.model.load_state_dict(self.kept.pop(version))
            self.kept = {known: value for known, value in self.kept.items() if known > version}
        self.own.update(version)
        self.version = version

    def ready(self) -> AbstractContextManager[None]:
        if not self.waits and self.newest() > self.version:
            self.update(self.newest())
        return nullcontext()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert self.own is not None, "no weights were sent"
        self.before(len(self.wrote))
        self.wrote.append((self.version, threading.current_thread().name))
        return self.own.generate(requests, sampling)

    def generate_each(
        self, requests: Sequence[Request], sampling: Sampling, told: Callable[[int, Completion], None]
    ) -> list[Completion]:
        found = self.generate(requests, sampling)
        for place in reversed(range(len(found))):
            self.between(place)
            told(place, found[place])
        return found

    def close(self) -> None:
        self.own, self.version, self.closed = None, -1, True

    def metrics(self) -> dict[str, float]:
        return {}


def other_engine(config: Any, lm: LanguageModel, vocab: int, prompts: Any, render: Any, newest: Any) -> FollowingHere:
    """In the place of `retort.train.models.other_engine.other_engine`."""
    return FollowingHere(lm, vocab, newest)


@contextmanager
def following() -> Iterator[None]:
    """Within, a run whose `rollout.engine` is not its own writes with a `FollowingHere`."""
    from retort.train.setup import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "other_engine", other_engine)
        patch.setattr(prepare, "check_other_engine", lambda config: None)
        yield


def killed_after(settings: dict[str, Any], folder: Path, step: int) -> None:
    """A run of `following` that kills its process by SIGKILL after a step; for `forked.started`."""
    with following():
        killed_with_workers(settings, folder, step)


def killed_with_workers(settings: dict[str, Any], folder: Path, step: int) -> None:
    """The same of a run with the engine that it names."""
    from retort import config
    from retort.train import runner
    from retort.train.events.observe import Silent

    class Killer(Silent):
        def step(self, step_: int, steps: int, metrics: object) -> None:
            if step_ == step:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    runner.start(config.resolve(settings), folder, Killer()).go()
