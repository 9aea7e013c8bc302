"""Generation by workers: processes with a copy of the model each, here or where others placed them.

Axis letters: see `retort.core`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.errors import SignalError, UnreachableError, UserError, shortened
from retort.files import remove
from retort.ranks import local_size
from retort.rollout.engines.answers import completions
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.children import STARTS, Children
from retort.rollout.engines.follower import Follower
from retort.rollout.engines.saved import save_weights, writing
from retort.wire import Client
from retort.wire.client import RefusedError
from retort.wire.protocol import CONFLICT, HEALTH, packed
from retort.wire.workers import GENERATE, KEY, LOAD

#: How often in a row a worker may end, or fail, before it has answered a request.
TRIES = 3
#: Seconds for an answer to any one request, for a sign of life, and between two questions for one.
_ANSWERS, _LIVES, _EVERY = 21_600.0, 5.0, 0.1
_TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class PoolSettings:
    """How the workers are started.

    Attributes:
        workers: Their number.
        placed: Their addresses, where others have started them and start them again.
        parallel: Completions that each generates at once.
        longest: Longest sequence, context and completion together, tokens; None for the model's own.
        bound: Nats by which their log-probs of generated tokens may differ from the model's, on average.
        hangs: Seconds without a sign of life after which one that was started here is killed and started again.
        threads: Of each; None: those of this process, shared out.
        trust_remote_code: Whether code of the model's folder is run.
        more: Further arguments of those that are started here, see `retort.serve.worker`.
    """

    workers: int
    placed: tuple[str, ...] = ()
    parallel: int = 256
    longest: int | None = None
    bound: float = 0.1
    hangs: float = 300.0
    threads: int | None = None
    trust_remote_code: bool = False
    more: tuple[str, ...] = ()


class _EndedError(RuntimeError):
    """The workers were ended by this process."""


@dataclass(eq=False)
class WorkerPool(Follower[PoolSettings]):
    """Has workers generate, each the loop of `HFEngine` over a copy of the model.

    Requests are dealt out to the workers by length and place, so that who writes which completion depends on the
    requests alone. All randomness is in the requests: what is beside one changes rounding only. Of several ranks each
    asks its own share of the workers. Nothing is kept of a conversation from one turn to the next.

    A worker that ends or hangs is started again at the same address; it then reads the present weights, and gets the
    same requests anew.

    Attributes: see `Follower`.
    """

    name = "the pool of workers"
    instead = "rollout.workers=0"

    _children: Children | None = field(default=None, init=False)
    _clients: list[Client] = field(default_factory=lambda: [], init=False)
    _signs: list[Client] = field(default_factory=lambda: [], init=False)
    _tokens: Path | None = field(default=None, init=False)
    _restarts: int = field(default=0, init=False)
    _counting: threading.Lock = field(default_factory=threading.Lock, init=False)
    _given_up: threading.Event = field(default_factory=threading.Event, init=False)
    _ended: threading.Event = field(default_factory=threading.Event, init=False)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`.

        Raises:
            UserError: Also where a prompt holds media.
            SignalError: What a worker sends are no completions of these requests.
            UnreachableError: One ended several times without an answer.
        """
        self.lm.check_readable((request.context for request in requests), "a prompt")
        if any(request.context.media for request in requests):
            raise UserError(
                "a prompt holds an image, a sound or a video, and rollout.workers hand on text alone; use "
                "rollout.workers=0"
            )
        if not requests:
            return []
        if self.world.size == 1:
            self.follow()
        return self._written(requests, sampling)

    def metrics(self) -> dict[str, float]:
        """See `Follower`; also how many workers had to begin anew so far, over all ranks, which all call it."""
        return {**super().metrics(), "engine/restarts": float(sum(self.world.each(lambda: self._restarts)))}

    @property
    def pids(self) -> list[int]:
        """Processes that were started here, each with its group."""
        return [] if self._children is None else self._children.pids

    def _written(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        ranks, count = self.world.size, len(self._clients)
        rank = self.world.rank
        mine = [n for n in range(count) if n % ranks == rank] if ranks <= count else [rank % count]
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].context), i))
        shares = [(worker, order[place :: len(mine)]) for place, worker in enumerate(mine)]
        shares = [(worker, own) for worker, own in shares if own]
        found = self._together(lambda one: self._share(one[0], [requests[i] for i in one[1]], sampling), shares)
        by_place: dict[int, Completion] = {}
        for (_, own), written in zip(shares, found, strict=True):
            by_place.update(zip(own, written, strict=True))
        return [by_place[i] for i in range(len(requests))]

    def _together(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """The results of some work, each item in a thread of its own."""
        self._given_up.clear()
        if len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(len(items)) as threads:
            futures = [threads.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException as error:
                self._given_up.set()
                if not isinstance(error, Exception) and self._children is not None:
                    self._children.close()  # Ctrl-C: nobody waits for answers
                raise

    def _share(self, worker: int, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        uniforms = [own.uniforms[: sampling.max_new_tokens] for own in requests]
        rooms = [len(own) for own in uniforms]
        tensors = {
            **packed([own.context.read() for own in requests]),
            "uniforms_U": torch.cat(uniforms),
            "rooms_S": torch.tensor(rooms),
        }
        settings = {
            "version": self.version,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        found = self._asked(worker, GENERATE, tensors, settings)
        try:
            return completions(found, rooms, vocab=self.rows, stops=self.lm.stops, version=self.version)
        except ValueError:
            raise SignalError(f"{self._named(worker)}: what it sends are no completions of its prompts") from None

    def _asked(
        self, worker: int, path: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """What a worker answers; one that ends is waited for, gets its weights again, and is asked again."""
        lost = without = 0
        while True:
            try:
                if self._ended.is_set():
                    raise _EndedError
                return self._clients[worker].post_tensors(path, tensors, settings)
            except RefusedError as error:
                without += 1
                if error.status != CONFLICT or self._now is None or without > 2 * TRIES:
                    said = shortened(str(error), 300)
                    raise UserError(f"{self._named(worker)} refuses what it is asked: {said}") from None
                self._read(worker, *self._now, again=True)
            except UnreachableError as error:
                lost += 1
                if lost > TRIES:
                    said = shortened(str(error).partition(" (at the first attempt)")[0], 300)
                    raise UnreachableError(
                        f"{self._named(worker)} was asked {lost} times in a row without an answer: {said}"
                    ) from None
                self._wait(worker)
            except RuntimeError as error:  # of a client that was closed meanwhile
                if not self._ended.is_set():
                    raise
                raise UnreachableError(f"{self.name} was ended while it was asked") from error

    def _read(self, worker: int, folder: Path, version: int, *, again: bool) -> None:
        """Has a worker read weights; `again`: one that had none has begun anew, which is counted."""
        from retort.models.packing import unwrapped  # loads transformers

        stops, attention = self.lm.stops, self.lm.model.config._attn_implementation
        settings = {
            "folder": str(folder.resolve()),
            "version": version,
            "vocab": self.rows,
            "stops": [stops.primary, *sorted(stops.ids - {stops.primary})],
            "precision": self.lm.precision,
            "attention": None if attention is None else unwrapped(attention),
            "parallel": self.settings.parallel,
            "longest": self.longest,
            "number": worker,
        }
        found = self._asked(worker, LOAD, {}, settings).get("fresh")
        if again and found is not None and bool(found.any()):
            with self._counting:
                self._restarts += 1

    def _wait(self, worker: int) -> None:
        """Waits until a worker shows signs of life.

        Raises:
            UnreachableError: It is not started any more, or not in time.
        """
        ends = time.monotonic() + STARTS
        while time.monotonic() < ends and not self._given_up.is_set() and not self._ended.is_set():
            problem = None if self._children is None else self._children.problem(worker)
            if problem is not None:
                raise UnreachableError(f"{self._named(worker)} is not started again: {problem}")
            with contextlib.suppress(RuntimeError, UserError):  # also of a client that was closed meanwhile
                self._signs[worker].get_json(HEALTH)
                return
            self._given_up.wait(_EVERY)
        waited = "did not come back before all were ended" if self._ended.is_set() else "did not come back in time"
        raise UnreachableError(f"{self._named(worker)} {waited}")

    def _named(self, worker: int) -> str:
        where = self._clients[worker].url if self._children is None else f"its log: {self._children.logs[worker]}"
        return f"worker {worker} of {len(self._clients)} ({where})"

    def _save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        save_weights(self.lm, weights, folder, self.lm.rows, untied=False)
        with writing(folder):
            if self._tokens is None:
                kept = folder.with_name(_TOKENIZER)
                remove(kept)
                self.lm.save_tokens(kept)
                self._tokens = kept
            shutil.copytree(self._tokens, folder, dirs_exist_ok=True)

    def _meet(self) -> None:
        if self._clients and not self._ended.is_set():
            return
        urls, key = self.world.first(self._start)
        os.environ[KEY] = key
        self._ended.clear()
        self._clients = [Client(url, key_variable=KEY, timeout=_ANSWERS, patience=0, concurrency=1) for url in urls]
        self._signs = [Client(url, key_variable=KEY, timeout=_LIVES, patience=0, concurrency=1) for url in urls]

    def _start(self) -> tuple[list[str], str]:
        """Addresses of the workers and their key; those that nobody has placed are started here."""
        asked = self.settings
        if asked.placed:
            return list(asked.placed), os.environ.get(KEY, "")
        assert self._folder is not None
        key = secrets.token_urlsafe(24)
        threads = asked.threads or max(1, torch.get_num_threads() // asked.workers)
        more = [*(["--trust-remote-code"] if asked.trust_remote_code else []), *asked.more]
        options = [["--device", self._device(n), "--threads", str(threads), *more] for n in range(asked.workers)]
        self._children = Children(options, self._folder, key=key, hangs=asked.hangs)
        return self._children.urls, key

    def _device(self, worker: int) -> str:
        """Where a worker computes: the GPUs behind those of the ranks first, in turn."""
        if self.lm.device.type != "cuda":
            return self.lm.device.type
        return f"cuda:{(local_size() + worker) % torch.cuda.device_count()}"

    def _begin(self, folder: Path, version: int) -> None:
        self._all_read(folder, version, again=False)

    def _load(self, folder: Path, version: int) -> None:
        self._all_read(folder, version, again=True)

    def _all_read(self, folder: Path, version: int, *, again: bool) -> None:
        workers = list(range(len(self._clients)))
        self._together(lambda worker: self._read(worker, folder, version, again=again), workers)

    def _end(self) -> None:
        self._ended.set()
        if self._children is not None:
            self._children.close()
        for own in [*self._clients, *self._signs]:
            own.close()
        if self._tokens is not None:
            remove(self._tokens)
        self._children, self._tokens = None, None
