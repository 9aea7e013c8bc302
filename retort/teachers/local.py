"""A teacher in this process. Axis letters: see `retort.types`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from retort.align.chat import Reading, Renderer
from retort.align.stops import KEPT, StopMap
from retort.errors import SignalError
from retort.models.core import in_blocks
from retort.models.head import Head
from retort.models.lm import LanguageModel
from retort.sequences import TokenSequence
from retort.signals import Dense, Sampled, TeacherSignal, TopK
from retort.teachers.scene import Scene, Stage
from retort.teachers.view import View
from retort.types import Need, NeedKind, Pack, Rollout


class Teacher(Protocol):
    """Whoever answers the tokens of rollouts."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def capabilities(self) -> frozenset[NeedKind]:
        """What it can be asked for."""
        ...

    def answer(self, pack: Pack, needs: frozenset[Need], view: View, temperature: float) -> TeacherSignal:
        """What it says about every step of a pack: what `needs` asks for and no more."""
        ...


@dataclass(frozen=True)
class Prompts:
    """What a teacher reads before each rollout of a pack.

    Attributes:
        ids: By rollout; None where there is no context.
        cut: How many had a privileged text cut to fit, or to nothing.
        shows: How many were shown something in the words of a template, by its name.
    """

    ids: Sequence[list[int] | None]
    cut: int = 0
    shows: Mapping[str, int] = field(default_factory=lambda: {})

    def valid_N(self, pack: Pack) -> Tensor | None:
        """See `TeacherSignal.valid_N`."""
        valid_R = torch.tensor([own is not None for own in self.ids])
        return None if bool(valid_R.all()) else valid_R[pack.rollout_N]

    @property
    def counts(self) -> dict[str, float]:
        """See `TeacherSignal.counts`."""
        read = [len(own) for own in self.ids if own is not None]
        shows = {f"shows/{name}": float(count) for name, count in self.shows.items()}
        return {"no_context": len(self.ids) - len(read), "cut": self.cut, "prompt_tokens": sum(read), **shows}


class LocalTeacher:
    """A frozen model in this process; it can be asked for anything but text."""

    capabilities: frozenset[NeedKind] = frozenset({"dense", "hidden"})

    def __init__(
        self,
        lm: LanguageModel,
        *,
        vocab: int,
        stop_map: Mapping[int, int],
        batch_tokens: int,
        reading: Reading | None = None,
        stage: Stage | None = None,
    ) -> None:
        """A teacher.

        Args:
            lm: The model.
            vocab: Ids that it shares with the student.
            stop_map: The student's stop token in place of the teacher's: applied to the answers it reads and to the
                distributions it returns, so that what it thinks of *its* stops is taught about the student's.
            batch_tokens: Tokens per forward pass.
            reading: What chat templates are told; by default nothing.
            stage: What views may look at besides a rollout and its siblings.
        """
        self.lm = lm
        self.vocab = vocab
        self.stop_map = stop_map if isinstance(stop_map, StopMap) else StopMap(dict(stop_map))
        self.batch_tokens = batch_tokens
        self.reading = reading or Reading()
        self.stage = stage or Stage()
        self.name = lm.name
        self.render = Renderer(lm.tokenizer, self.reading)

    def in_its_own_words(self) -> LocalTeacher:
        """The same teacher about answers that end in its own stop token, such as its own."""
        return self._changed(stop_map={})

    def about(self, vocab: int) -> LocalTeacher:
        """The same teacher about fewer ids."""
        return self._changed(vocab=vocab)

    def on(self, stage: Stage) -> LocalTeacher:
        """The same teacher, whose views may look at more."""
        return self._changed(stage=stage)

    def _changed(self, **changed: Any) -> LocalTeacher:
        names = ("vocab", "stop_map", "batch_tokens", "reading", "stage")
        return LocalTeacher(self.lm, **{name: getattr(self, name) for name in names} | changed)

    def answer(
        self,
        pack: Pack,
        needs: frozenset[Need],
        view: View,
        temperature: float,
        *,
        head: Callable[[], Head] | None = None,
    ) -> TeacherSignal:
        """See `Teacher`. A dense or hidden need keeps hidden states, [N, D]; others are reduced chunk by chunk at once.

        Args:
            pack: Rollouts.
            needs: What is asked.
            view: What it sees.
            temperature: Of the distributions.
            head: Gives the head as it is at this moment, where its weights move; None: the model's, which must not.
        """
        prompts = self.prompts(pack, view)
        hidden_ND, logits = self._hidden(pack, prompts), self._logits
        unchanged = head or self._unchanged_head()
        valid_N = prompts.valid_N(pack)

        def rows(index_C: Tensor | slice) -> Tensor:
            return logits(unchanged(), hidden_ND[index_C], temperature)

        dense = Dense(
            pack.tokens_N.to(self.lm.device),
            self.name,
            rows,
            self.vocab,
            temperature,
            valid_N=None if valid_N is None else valid_N.to(self.lm.device),
            counts=prompts.counts,
            hidden=lambda index_C: hidden_ND[index_C],
        )
        if any(need.kind in ("dense", "hidden") for need in needs):
            return dense
        return reduced(dense, needs)

    def _unchanged_head(self) -> Callable[[], Head]:
        version = self.lm.head().weight_VD._version  # pyright: ignore[reportPrivateUsage]

        def head() -> Head:
            found = self.lm.head()
            if found.weight_VD._version != version:  # pyright: ignore[reportPrivateUsage]
                raise SignalError(f"{self.name}: the teacher's head changed after it had scored this batch")
            return found

        return head

    def prompts(self, pack: Pack, view: View) -> Prompts:
        """What the teacher reads before each rollout of a pack: as long as the stage and its context allow."""
        found, cut, shows = list[list[int] | None](), 0, dict[str, int]()
        for rollout, group in zip(pack.rollouts, pack.groups(), strict=True):
            longest = min(self.stage.longest or 2**31, self.lm.context - len(rollout.sequence.continuation))
            scene = Scene(rollout, group, self.stage, shown=set())
            prompt = view.prompt(scene)
            # A view shows what models wrote: what it spells must not end a run.
            render = self.render if view.render is None else partial(self.render, split=True)
            ids = None if prompt is None else render(prompt)
            if ids is not None and view.render is not None and len(ids) > longest:
                prompt = scene.shortened(
                    view.prompt, lambda made, most=longest: len(self.render(made, split=True)) <= most
                )
                ids = None if prompt is None else render(prompt)
                cut += 1
            for name in (scene.shown or ()) if ids is not None else ():
                shows[name] = shows.get(name, 0) + 1
            found.append(ids)
        return Prompts(found, cut, shows)

    def _hidden(self, pack: Pack, prompts: Prompts) -> Tensor:
        """Hidden states at every step, [N, D]; zeros where there is no context."""
        sequences = [
            self._sequence(rollout, ids)
            for rollout, ids in zip(pack.rollouts, prompts.ids, strict=True)
            if ids is not None
        ]
        valid_N = prompts.valid_N(pack)
        if not sequences:
            weight_VD = self.lm.head().weight_VD
            return weight_VD.new_zeros(pack.steps, weight_VD.shape[1])
        hidden_ND = self.lm.all_hidden(sequences, self.batch_tokens)
        if valid_N is None:
            return hidden_ND
        index_N = valid_N.nonzero().squeeze(-1).to(hidden_ND.device)
        return hidden_ND.new_zeros(pack.steps, hidden_ND.shape[1]).index_copy_(0, index_N, hidden_ND)

    def _sequence(self, rollout: Rollout, prompt_ids: list[int]) -> TokenSequence:
        """What the teacher reads: its own rendering of the prompt, then the very tokens that followed the student's.

        What an environment said in between is as the student read it; in what the student decided, stops are mapped.
        """
        # The student's prompt may hold what this model has no row for; it renders its own, but from text alone.
        self.lm.check_media([rollout.sequence], f"the rollout of prompt '{rollout.prompt.id}'")
        return rollout.sequence.mapped(self.stop_map).with_prefix(TokenSequence.of(prompt_ids))

    def _logits(self, head: Head, hidden_CD: Tensor, temperature: float) -> Tensor:
        with torch.no_grad(), self.lm.compute():
            logits_CV = head.logits(hidden_CD, self.vocab)
        # In place: the product is ours, and large.
        if len(self.stop_map):
            here, there = list(self.stop_map), list(self.stop_map.values())
            logits_CV[:, here] = logits_CV[:, there]
        if self.stop_map.merged:
            _merge(logits_CV, self.stop_map, temperature)
        return logits_CV


def _merge(logits_CV: Tensor, stops: StopMap, temperature: float) -> None:
    """Gives the probability of the teacher's further stops to one id, but for a share that keeps each finite.

    At the temperature at which the distribution is read, so that their probabilities add up there.
    """
    merged, kept = list(stops.merged), math.log(KEPT)
    exact = torch.float64 if logits_CV.dtype == torch.float64 else torch.float32
    stop_CS = logits_CV[:, [stops.into, *merged]].to(exact)
    # The map divides as the reader will: exp(logit / temperature), up to one factor per row.
    together_C = torch.logsumexp(stop_CS / temperature, dim=-1)
    logits_CV[:, stops.into] = ((together_C + math.log1p(-len(merged) * KEPT)) * temperature).to(logits_CV.dtype)
    logits_CV[:, merged] = ((together_C + kept) * temperature).to(logits_CV.dtype)[:, None]


@torch.no_grad()
def reduced(dense: Dense, needs: frozenset[Need]) -> TeacherSignal:
    """The smallest signal that answers the needs, computed chunk by chunk."""
    top_k = max((need.k for need in needs if need.kind == "topk"), default=0)
    with_entropy = any(need.kind == "entropy" for need in needs)
    sampled: list[Tensor] = []
    entropies: list[Tensor] = []
    ids: list[Tensor] = []
    logps: list[Tensor] = []
    for rows in in_blocks(dense, dense.width):
        sampled.append(rows.sampled_logp_N)
        if with_entropy:
            entropies.append(rows.entropy_N)
        if top_k:
            ids_CK, logp_CK = rows.topk(top_k)
            ids.append(ids_CK)
            logps.append(logp_CK)
    if not top_k and not with_entropy:
        return Sampled(dense.tokens_N, dense.source, torch.cat(sampled), valid_N=dense.valid_N, counts=dense.counts)
    return TopK(
        dense.tokens_N,
        dense.source,
        ids_NK=torch.cat(ids) if ids else dense.tokens_N.new_empty(dense.steps, 0),
        logp_NK=torch.cat(logps) if logps else dense.tokens_N.new_empty(dense.steps, 0, dtype=torch.float32),
        sampled_logp_N=torch.cat(sampled),
        entropy_N=torch.cat(entropies) if entropies else None,
        whole=top_k >= dense.width,
        valid_N=dense.valid_N,
        counts=dense.counts,
    )


def answers(
    teachers: Mapping[str, Teacher],
    views: Mapping[str, View],
    pack: Pack,
    needs: Callable[[str], frozenset[Need]],
    temperature: float,
) -> dict[str, TeacherSignal]:
    """Every view's signal about a pack, checked to be about its very tokens."""
    found = {name: teachers[name].answer(pack, needs(name), view, temperature) for name, view in views.items()}
    for signal in found.values():
        signal.check_tokens(pack.tokens_N)
    return found
