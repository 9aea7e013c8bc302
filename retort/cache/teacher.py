"""A teacher whose scores are cached on disk. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate

import torch
from torch import Tensor

from retort.cache.entries import entries_of, signal_of
from retort.cache.keys import signal_key, states_key
from retort.cache.shards import Entry
from retort.cache.store import Store
from retort.core.needs import Capability
from retort.core.rollouts import Group, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import TeacherSignal
from retort.models.fingerprint import digests_of, fingerprint_of
from retort.models.lm import LanguageModel
from retort.teachers.base import CacheableTeacher, Read, ScoreRequest, Teacher

#: The name of the only tensor of an entry of hidden states.
_STATES = "states"


@dataclass(eq=False)
class Tally:
    """How often something was found in the cache since it was last asked.

    Attributes:
        asked: Scores of a rollout, or hidden states of a sequence, that were wanted.
        found: Those of them that were stored.
    """

    asked: int = 0
    found: int = 0

    def add(self, asked: int, found: int) -> None:
        """Counts some more."""
        self.asked, self.found = self.asked + asked, self.found + found

    def take(self) -> tuple[int, int]:
        """What was counted, which then begins anew: asked, found."""
        taken, self.asked, self.found = (self.asked, self.found), 0, 0
        return taken


@dataclass(eq=False)
class CachedModel:
    """A model whose weights do not move, and what a store holds about it.

    Attributes:
        store: The store.
        identify: Gives a fingerprint of the model; called once, before the first look into the store.
        keep: Stores what of the model is needed to use its entries without it; called once, before the first entry.
        tally: What was found.
    """

    store: Store
    identify: Callable[[], str]
    keep: Callable[[], None] = lambda: None
    tally: Tally = field(default_factory=Tally)
    _kept: bool = field(default=False, init=False)

    @staticmethod
    def of(store: Store, lm: LanguageModel, tally: Tally) -> CachedModel:
        """A frozen model in this process. Its weights are read once, which takes about a second per gigabyte."""
        known = cache(lambda: digests_of(lm))
        identify = cache(lambda: fingerprint_of(lm, known()))
        return CachedModel(store, identify, lambda: store.keep_model(lm, known(), identify()), tally)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the model."""
        return self.identify()

    def put(self, entries: Mapping[str, Entry]) -> None:
        """Stores entries about the model."""
        if not entries:
            return
        if not self._kept:
            self.keep()
            self._kept = True
        self.store.put(self.fingerprint, entries)

    def states(
        self, compute: Callable[[Sequence[TokenSequence]], Tensor]
    ) -> Callable[[Sequence[TokenSequence]], Tensor]:
        """The function `compute`, which gives hidden states [N, D] at the decided tokens of sequences, cached.

        Only sequences that are not stored are computed, all at once.
        """

        def cached(sequences: Sequence[TokenSequence]) -> Tensor:
            keys = [states_key(self.fingerprint, own) for own in sequences]
            found = self.store.get(keys)
            missing = [index for index, key in enumerate(keys) if key not in found]
            self.tally.add(len(keys), len(keys) - len(missing))
            computed_ND = compute([sequences[index] for index in missing])
            if len(missing) == len(keys):
                self._put_states(keys, sequences, computed_ND)
                return computed_ND
            parts = computed_ND.split([sequences[index].steps for index in missing])
            new = dict(zip(missing, parts, strict=True))
            self._put_states([keys[i] for i in missing], [sequences[i] for i in missing], computed_ND)
            rows = [new[i] if i in new else found[key][_STATES].to(computed_ND.device) for i, key in enumerate(keys)]
            return torch.cat(rows)

        return cached

    def _put_states(self, keys: Sequence[str], sequences: Sequence[TokenSequence], states_ND: Tensor) -> None:
        parts = states_ND.split([own.steps for own in sequences])
        self.put({key: {_STATES: part_AD} for key, part_AD in zip(keys, parts, strict=True)})


class CachedTeacher:
    """A teacher whose signals are stored, one entry for each rollout.

    Of signals that keep a whole distribution, the hidden states are stored (`CachedModel.states`). Batches may be cut
    differently from run to run. What is not stored is asked of the teacher behind it, in whole groups, because views
    may show siblings.
    """

    def __init__(
        self,
        behind: CacheableTeacher,
        model: CachedModel,
        whole: Teacher | None = None,
        *,
        states_only: bool = False,
    ) -> None:
        """Builds the teacher.

        Args:
            behind: The teacher.
            model: Its model, and the store.
            whole: The same teacher with cached hidden states, which is asked for whole distributions; None for a
                teacher that has none.
            states_only: Whether all signals are made of cached hidden states, and none are stored.
        """
        self.behind, self.model, self.whole = behind, model, whole
        self.states_only = states_only

    @property
    def name(self) -> str:
        """See `Teacher`."""
        return self.behind.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        """See `Teacher`."""
        return self.behind.capabilities

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        """See `Teacher`."""
        if request.ahead:  # after ids that another student will not think of; nothing is stored
            return self.behind.score(groups, request)
        if self.whole is not None and self._by_states(request):
            return self.whole.score(groups, request)
        read, rollouts = self.behind.read(groups, request.view), [own for group in groups for own in group]
        keys = self._keys(rollouts, read, request)
        wanted = [key for key in keys if key is not None]
        stored: dict[str, Mapping[str, Tensor]] = {**self.model.store.get(wanted)}
        self.model.tally.add(len(wanted), sum(key in stored for key in wanted))
        if not any(key in stored for key in wanted):
            signal = self.behind.score(groups, request)
            self._put(keys, entries_of(signal, [own.steps for own in rollouts]))
            return signal
        lacking = [key is not None and key not in stored for key in keys]
        if any(lacking):
            stored |= self._computed(groups, request, keys, lacking)
        entries = [None if key is None else stored[key] for key in keys]
        return signal_of(entries, [own.actions_A for own in rollouts], self.name, read.counts)

    def missing(self, groups: Sequence[Group], request: ScoreRequest) -> list[Rollout]:
        """The rollouts of whose scores some are not stored; no model is asked anything."""
        read, rollouts = self.behind.read(groups, request.view), [own for group in groups for own in group]
        if self.whole is not None and self._by_states(request):
            keys = [
                [states_key(self.model.fingerprint, own) for own in sequences or () if own.steps]
                for sequences in read.sequences
            ]
        else:
            keys = [[] if key is None else [key] for key in self._keys(rollouts, read, request)]
        stored = self.model.store.has([key for own in keys for key in own])
        return [rollout for rollout, own in zip(rollouts, keys, strict=True) if not stored.issuperset(own)]

    def _by_states(self, request: ScoreRequest) -> bool:
        return request.whole or self.states_only

    def _keys(self, rollouts: Sequence[Rollout], read: Read, request: ScoreRequest) -> list[str | None]:
        """The key of each rollout; None where there is no context."""
        given: Sequence[Tensor | None] = [None] * len(rollouts)
        if request.student_ids_NK is not None:
            given = request.student_ids_NK.split([own.steps for own in rollouts])
        return [
            None
            if sequences is None
            else signal_key(self.model.fingerprint, read.interpretation, sequences, own.actions_A, request, ids_AK)
            for own, sequences, ids_AK in zip(rollouts, read.sequences, given, strict=True)
        ]

    def _put(
        self, keys: Sequence[str | None], entries: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Mapping[str, Tensor]]:
        found = {key: own for key, own in zip(keys, entries, strict=True) if key is not None}
        self.model.put(found)
        return found

    def _computed(
        self, groups: Sequence[Group], request: ScoreRequest, keys: Sequence[str | None], lacking: Sequence[bool]
    ) -> dict[str, Mapping[str, Tensor]]:
        """Entries of the rollouts that lack one, which are stored, too."""
        ends = list(accumulate((len(group) for group in groups), initial=0))
        chosen = [index for index in range(len(groups)) if any(lacking[ends[index] : ends[index + 1]])]
        members = [member for index in chosen for member in range(ends[index], ends[index + 1])]
        rollouts = [rollout for group in groups for rollout in group]
        ids_NK = request.student_ids_NK
        if ids_NK is not None:
            parts = ids_NK.split([own.steps for own in rollouts])
            ids_NK = torch.cat([parts[member] for member in members])
        signal = self.behind.score([groups[index] for index in chosen], replace(request, student_ids_NK=ids_NK))
        entries = entries_of(signal, [rollouts[member].steps for member in members])
        own_keys = [keys[member] if lacking[member] else None for member in members]
        found = self._put(own_keys, entries)
        return {key: {name: values.cpu() for name, values in own.items()} for key, own in found.items()}
