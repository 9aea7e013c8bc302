"""What engines with a copy of the model's weights share: how the weights reach them, and how far they are from it.

Axis letters: see `retort.core`.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from retort.core.sequences import TokenSequence
from retort.errors import RetortError, UnreachableError, UserError
from retort.files import remove
from retort.models.lm import LanguageModel
from retort.ranks import World, here
from retort.rollout.engines.base import Completion, Request, Sampling
from retort.rollout.engines.of_model import OfModel
from retort.rollout.engines.saved import save_weights, weights_of

#: Tokens of each completion by which both sides are compared, and prompts that are completed for that.
PROBE_TOKENS, PROBE_PROMPTS = 16, 8


class FollowerSettings(Protocol):
    """What the settings of every such engine say."""

    @property
    def bound(self) -> float:
        """Nats by which its log-probs of generated tokens may differ from the model's, on average."""
        ...

    @property
    def longest(self) -> int | None:
        """Longest sequence, context and completion together, tokens; None for the model's own."""
        ...


S = TypeVar("S", bound=FollowerSettings)


@dataclass(frozen=True)
class _Kept:
    """Weights that wait to be loaded: their folder, and the thread in which the model was at rest."""

    folder: Path
    thread: int


@dataclass(eq=False)
class Follower(OfModel[LanguageModel], ABC, Generic[S]):
    """An engine that reads the model's weights from a folder anew whenever they have changed.

    Of several ranks the first one writes and sends the weights; all of them call `update`, `keep` and `close`, and
    enter `ready`, together. If the engine does not take weights, or does not compute what the model here does, it gets
    the former ones back.

    Attributes:
        lm: The model whose weights it follows; it stays in this process.
        vocab: Only ids below this are tokens.
        settings: How the engine is started.
        newest: Returns the version of the model's weights as they are now; they are sent before the next completion,
            unless someone calls `keep`, who then says which version is wanted.
        probe: Contexts that are completed after weights were sent, to compare both sides.
        world: The ranks of the run.
        version: Version of the weights that the engine has; -1 before the first.
        noise_floor: Mean size of the difference of both sides' log-probs of the probe's tokens, nats.
    """

    #: What it is called in messages, and the setting that does without it.
    name: ClassVar[str]
    instead: ClassVar[str]
    reads_images: ClassVar[bool] = False

    lm: LanguageModel
    vocab: int
    settings: S
    newest: Callable[[], int] = lambda: 0
    probe: Sequence[TokenSequence] = ()
    world: World = field(default_factory=here)
    version: int = -1
    noise_floor: float = math.nan
    _folder: Path | None = None
    _weights: Path | None = field(default=None, init=False)
    _kept: dict[int, _Kept] = field(default_factory=lambda: {}, init=False)
    _now: tuple[Path, int] | None = field(default=None, init=False)
    _begun: bool = field(default=False, init=False)
    _waits: bool = field(default=False, init=False)
    _newest_kept: int = field(default=-1, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def longest(self) -> int:
        """The longest sequence that the engine takes, tokens."""
        return min(self.lm.context, self.settings.longest or self.lm.context)

    @property
    def rows(self) -> int:
        """Number of ids that can be generated."""
        return min(self.vocab, self.lm.rows)

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """See `Engine`; one that calls `follow` first writes with the newest weights."""

    def open(self, folder: Path) -> None:
        """Has weights and logs kept in a folder from now on; without one they are in a temporary folder.

        Args:
            folder: Made when weights are first sent. Of weights that were left in it, nothing is read.
        """
        self._folder, self._waits = folder, False

    def keep(self, version: int) -> None:
        """See `FollowingEngine`; from now on only versions that are asked for are loaded."""
        self._waits = True
        # What was loaded by now depends on the other thread, and on several ranks all have to write or none.
        if version != self._newest_kept:
            kept = _Kept(self._saved(version, None), threading.get_ident())
            with self._lock:
                self._kept[version] = kept
            self._newest_kept = version

    def update(self, version: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Sends weights to the engine, and compares both sides on the probe.

        Weights that `keep` kept are not compared if the model has moved on since, or may do so meanwhile (in another
        thread than that of `keep`): the noise floor is then the one last measured.

        Args:
            version: See `Engine`; with the version that it has, and no weights, nothing is done.
            weights: By the names of the model's folder; None for those that were kept, or of `lm` as they are now.

        Raises:
            UserError: The engine cannot hold the model, or computes something else than `lm`.
            UnreachableError: It does not take the weights, or has ended.
            RunError: The disk is full.
        """
        if weights is None and version == self.version:
            return
        with self._lock:
            kept = self._kept.pop(version, None) if weights is None else None
        if self._waits and weights is None and kept is None:  # `close` was called: the model may be learning
            raise UnreachableError(f"{self.name} was ended before it was to have the weights of version {version}")
        folder = self._saved(version, weights) if kept is None else kept.folder
        moves = kept is not None and (kept.thread != threading.get_ident() or self.newest() != version)
        before, had = self._weights, self.version
        self._now = folder, version
        try:
            self._meet()
            self.world.first(lambda: self._send(folder, version))
            self._begun, self.version = True, version
            if kept is None and weights is None:
                self._newest_kept = version
            if not moves:
                self._compare()
        except BaseException as error:
            self._go_back(before, had, error)
            if self.world.leads:
                remove(folder)
            if before is None or not isinstance(error, UserError | UnreachableError):
                raise
            stays = f"keeps those of version {had}" if self._begun else "is ended"
            said = f"the student's weights of version {version} are not in {self.name}, which {stays}: {error}"
            raise type(error)(said) from None
        self._weights = folder
        with self._lock:
            older = [self._kept.pop(own).folder for own in list(self._kept) if own < version]
        if self.world.leads:
            for own in older if before is None else [before, *older]:
                remove(own)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within, it generates with the newest weights; all ranks enter it together."""
        self.follow()
        yield

    def follow(self) -> None:
        """Sends the newest weights if the model has moved, unless versions are kept; all ranks call it together."""
        if not self._waits and self.newest() > self.version:
            self.update(self.newest())

    def close(self) -> None:
        """Ends the engine and removes the weights that it read.

        The next completion would start it again, unless someone has called `keep`: that thread may still be at work.
        """
        self._end()
        self._begun, self.version, self._newest_kept = False, -1, -1
        with self._lock:
            left = [own.folder for own in self._kept.values()]
            self._kept.clear()
        if self.world.leads:
            for own in left if self._weights is None else [self._weights, *left]:
                remove(own)
        self._weights = self._now = None

    def metrics(self) -> dict[str, float]:
        """Of a step: the noise floor that was last measured, nats."""
        return {"engine/noise_floor": self.noise_floor} if math.isfinite(self.noise_floor) else {}

    def _meet(self) -> None:
        """Brings all ranks together with the engine before weights are sent; all of them call it."""

    @abstractmethod
    def _begin(self, folder: Path, version: int) -> None:
        """Starts the engine with the weights of a folder; the first rank calls it."""

    @abstractmethod
    def _load(self, folder: Path, version: int) -> None:
        """Has the engine, which runs, read weights and say their version; the first rank calls it."""

    @abstractmethod
    def _written(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Completions of some requests; the first rank calls it."""

    @abstractmethod
    def _end(self) -> None:
        """Ends the engine if it runs; every rank calls it."""

    def _save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes weights as the engine reads them."""
        save_weights(self.lm, weights, folder, self.lm.rows, untied=False)

    def _saved(self, version: int, weights: Mapping[str, Tensor] | None) -> Path:
        """A new folder with these weights, or with the model's own."""
        folder = self.world.first(lambda: self._place(version))
        with self.lm.offload.kept(), self.lm.whole_state() as state:
            self.world.first(lambda: self._save(weights_of(self.lm, state) if weights is None else weights, folder))
        return folder

    def _place(self, version: int) -> Path:
        """Where weights go; what an earlier process left there is removed."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="retort-engine-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        if not self._begun and not self._kept:
            for left in self._folder.glob("weights-*"):
                remove(left)
        folder = self._folder / f"weights-{version}"
        return folder.with_name(f"{folder.name}-anew") if folder == self._weights else folder

    def _send(self, folder: Path, version: int) -> None:
        (self._load if self._begun else self._begin)(folder, version)

    def _compare(self) -> None:
        """Has the engine complete the probe, and the model here score what it wrote.

        Raises:
            UserError: Their log-probs differ by more than the bound.
        """
        readable = [own for own in self.probe if int(own.tokens_L.max()) < self.rows]
        contexts = [own for own in readable if len(own) + PROBE_TOKENS <= self.longest][:PROBE_PROMPTS]
        numbers = [torch.full((PROBE_TOKENS,), (n + 0.5) / PROBE_PROMPTS).double() for n in range(len(contexts))]
        asked = [Request(own, uniforms) for own, uniforms in zip(contexts, numbers, strict=True)]
        if not asked:
            return
        found = self.world.first(lambda: self._written(asked, Sampling(PROBE_TOKENS)))
        written = [own.context.read().then(one.ids, decided=True) for own, one in zip(asked, found, strict=True)]
        theirs_N = torch.cat([one.logp_A for one in found])
        self.noise_floor = self.world.agree(float((self._scored(written) - theirs_N).abs().double().mean()))
        if not self.noise_floor <= self.settings.bound:
            raise UserError(
                f"{self.name} computes something else than the student: their log-probs of the same tokens differ by "
                f"{self.noise_floor:.2g} nats on average, and rollout.noise_bound is {self.settings.bound:g}; use "
                f"{self.instead} for this model, or raise the bound if that is rounding"
            )

    @torch.no_grad()
    def _scored(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The model's own log-probs of the decided tokens, nats, [N]."""
        tokens_N = torch.cat([own.actions_A for own in sequences])
        with self.lm.whole(), self.lm.compute():
            hidden_ND = self.lm.all_hidden(sequences, 4096)
            logits_NV = self.lm.head().logits(hidden_ND)[:, : self.rows].float()
        return logits_NV.log_softmax(-1).cpu().gather(1, tokens_N[:, None].cpu()).squeeze(1)

    def _go_back(self, before: Path | None, had: int, error: BaseException) -> None:
        """Restores the weights that the engine had; without any, or where it does not take them, it is ended.

        Args:
            before: Their folder, if it had any.
            had: Their version.
            error: What went wrong; only errors of ours are raised on all ranks alike.
        """
        self._now = None if before is None else (before, had)

        def restored() -> bool:
            if self._begun and before is not None:
                with contextlib.suppress(UserError, UnreachableError):
                    self._load(before, had)
                    return True
            return False

        stays = self.world.first(restored) if isinstance(error, RetortError) else self.world.leads and restored()
        self.version = had
        if not stays:
            self._end()
            self._begun, self.version, self._now = False, -1, None
