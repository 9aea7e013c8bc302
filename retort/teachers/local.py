"""A teacher in this process. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from retort.align.chat import Renderer, TemplateOptions, render
from retort.align.pair import Alignment
from retort.core.head import Head
from retort.core.needs import Need, NeedKind
from retort.core.per_token import in_blocks
from retort.core.rollouts import Group, Pack, Prompt, Rollout
from retort.core.sequences import TokenSequence
from retort.core.signals import Candidates, Dense, Factors, Sampled, TeacherSignal, TopK
from retort.errors import SignalError
from retort.models.lm import LanguageModel
from retort.teachers.base import Read, ScoreRequest
from retort.teachers.view import View
from retort.teachers.view_input import Stage, ViewInput


@dataclass(frozen=True)
class Prompts:
    """The prompts that a teacher reads before the rollouts of a pack.

    Attributes:
        ids: Prompt ids of each sequence (`Pack.sequences`); None where there is no context.
        first: Those of the first sequence of each rollout.
        cut: Number of rollouts with a privileged text cut to fit, or to nothing.
        shows: Number of rollouts that a template was shown for, by its name.
    """

    ids: Sequence[list[int] | None]
    first: Sequence[list[int] | None]
    cut: int = 0
    shows: Mapping[str, int] = field(default_factory=lambda: {})

    def valid_N(self, pack: Pack) -> Tensor | None:
        """See `TeacherSignal.valid_N`."""
        valid_S = torch.tensor([own is not None for own in self.ids])
        return None if bool(valid_S.all()) else valid_S.repeat_interleave(pack.steps_S)

    @property
    def counts(self) -> dict[str, float]:
        """See `TeacherSignal.counts`."""
        read = [len(own) for own in self.first if own is not None]
        shows = {f"shows/{name}": float(count) for name, count in self.shows.items()}
        return {"no_context": len(self.first) - len(read), "cut": self.cut, "prompt_tokens": sum(read), **shows}


#: Sequences -> hidden states at their decided tokens, end to end, [N, D].
States = Callable[[Sequence[TokenSequence]], Tensor]


class LocalTeacher:
    """A frozen model in this process; it meets any need but text."""

    capabilities: frozenset[NeedKind] = frozenset({"dense", "hidden"})

    def __init__(
        self,
        lm: LanguageModel,
        *,
        alignment: Alignment,
        batch_tokens: int,
        template_options: TemplateOptions | None = None,
        stage: Stage | None = None,
        states: States | None = None,
    ) -> None:
        """Builds the teacher.

        Args:
            lm: The model.
            alignment: The alignment with the student's ids.
            batch_tokens: Tokens per forward pass.
            template_options: Options of chat templates.
            stage: Data that views may read besides a rollout and its siblings.
            states: Gives the model's hidden states; None: they are computed.
        """
        self.lm = lm
        self.alignment = alignment
        self.batch_tokens = batch_tokens
        self.template_options = template_options or TemplateOptions()
        self.stage = stage or Stage()
        self.states = states
        self.name = lm.name
        self.render = Renderer(lm.tokenizer, self.template_options)

    def in_own_ids(self) -> LocalTeacher:
        """The same teacher for completions in its own ids with its own stop token, such as its own."""
        return self._changed(alignment=self.alignment.itself())

    def for_vocab(self, vocab: int) -> LocalTeacher:
        """The same teacher for fewer ids of the student's."""
        return self._changed(alignment=self.alignment.for_vocab(vocab))

    def on(self, stage: Stage) -> LocalTeacher:
        """The same teacher with other data for its views."""
        return self._changed(stage=stage)

    def with_states(self, states: Callable[[States], States]) -> LocalTeacher:
        """The same teacher with another way to its hidden states, which is given the one that computes them."""
        return self._changed(states=states(self.hidden_states))

    def hidden_states(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """The model's last hidden states at the decided tokens of sequences, end to end, [N, D], without gradient."""
        return self.lm.all_hidden(sequences, self.batch_tokens) if self.states is None else self.states(sequences)

    def _changed(self, **changed: Any) -> LocalTeacher:
        names = ("alignment", "batch_tokens", "template_options", "stage", "states")
        return type(self)(self.lm, **{name: getattr(self, name) for name in names} | changed)

    def score(
        self, groups: Sequence[Group], request: ScoreRequest, *, head: Callable[[], Head] | None = None
    ) -> TeacherSignal:
        """See `Teacher`. A whole signal (`ScoreRequest.whole`) keeps hidden states, [N, D]; all others are reduced.

        Args:
            groups: The rollouts.
            request: The request.
            head: Gives the current head, where its weights move; None: the model's, which must not change.
        """
        pack, temperature = Pack.of([rollout for group in groups for rollout in group]), request.temperature
        prompts = self.prompts(pack, request.view)
        with self.lm.scoring():
            hidden_ND, logits = self._hidden(pack, prompts), self._logits
            unchanged = head or self._unchanged_head()
        valid_N = prompts.valid_N(pack)

        def rows(index_C: Tensor | slice) -> Tensor:
            return logits(unchanged(), hidden_ND[index_C], temperature)

        dense = Dense(
            pack.steps.tokens_N.to(self.lm.device),
            self.name,
            rows,
            self.alignment.vocab,
            temperature,
            valid_N=None if valid_N is None else valid_N.to(self.lm.device),
            counts=prompts.counts,
            hidden=lambda index_C: hidden_ND[index_C],
            factors=Factors(
                lambda index_C: hidden_ND[index_C],
                lambda hidden_CD, ids: self._logits_of(unchanged(), hidden_CD, ids, temperature),
            ),
        )
        return dense if request.whole else reduced(dense, request.needs, request.student_ids_NK)

    def read(self, groups: Sequence[Group], view: View) -> Read:
        """See `CacheableTeacher`."""
        pack = Pack.of([rollout for group in groups for rollout in group])
        prompts = self.prompts(pack, view)
        read = [
            None if ids is None else self._sequence(sequence, ids)
            for sequence, ids in zip(pack.sequences, prompts.ids, strict=True)
        ]
        ends = list(accumulate((len(rollout.sequences) for rollout in pack.rollouts), initial=0))
        parts = [read[start:end] for start, end in pairwise(ends)]
        sequences = [None if None in own else tuple(one for one in own if one is not None) for own in parts]
        return Read(sequences, self.alignment.digest, prompts.counts)

    def _unchanged_head(self) -> Callable[[], Head]:
        if self.lm.sharding.spreads_head:
            kept = self.lm.head().each(lambda part: part.detach().clone())  # gathered, and gone after this pass
            return lambda: kept
        version = self.lm.head().weight_VD._version  # pyright: ignore[reportPrivateUsage]

        def head() -> Head:
            found = self.lm.head()
            if found.weight_VD._version != version:  # pyright: ignore[reportPrivateUsage]
                raise SignalError(f"{self.name}: the teacher's head changed after it had scored this batch")
            return found

        return head

    def prompts(self, pack: Pack, view: View) -> Prompts:
        """The prompts before the rollouts of a pack, as long as the stage and the model's context allow.

        A view's prompt takes the first prompt's place before every sequence of a rollout, and the messages that follow
        the first prompt there follow the view's.
        """
        found, first, cut, shows = list[list[int] | None](), list[list[int] | None](), 0, dict[str, int]()
        for rollout, group in zip(pack.rollouts, pack.groups(), strict=True):
            view_input = ViewInput(rollout, group, self.stage, shown=set())
            prompt = view.prompt(view_input)
            split = view.render is not None
            ids = None if prompt is None else self._before(rollout, prompt, split=split)
            if ids is not None and split and not self._fits(rollout, ids):
                prompt = view_input.shortened(
                    view.prompt, lambda made, own=rollout: self._fits(own, self._before(own, made, split=True))
                )
                ids = None if prompt is None else self._before(rollout, prompt, split=True)
                cut += 1
            for name in (view_input.shown or ()) if ids is not None else ():
                shows[name] = shows.get(name, 0) + 1
            found += [None] * len(rollout.sequences) if ids is None else ids
            first.append(None if ids is None else ids[0])
        return Prompts(found, first, cut, shows)

    def _before(self, rollout: Rollout, prompt: Prompt, *, split: bool) -> list[list[int]]:
        """The ids before each sequence of a rollout that began with this prompt."""
        first, *later = rollout.prompts(prompt)
        # A view, and a conversation, show texts that models generated: tokens that they spell must not end a run.
        # What was said comes once, so there is no use in caching it.
        own = (render(prompt, self.lm.tokenizer, self.template_options, split=True) for prompt in later)
        return [self.render(first, split=split), *own]

    def _fits(self, rollout: Rollout, ids: Sequence[list[int]]) -> bool:
        """Whether the first prompt is short enough for the stage, and each with its sequence for the model."""
        sequences = zip(ids, rollout.sequences, strict=True)
        whole = all(len(own) + len(sequence.continuation) <= self.lm.context for own, sequence in sequences)
        return whole and len(ids[0]) <= (self.stage.longest or 2**31)

    def _hidden(self, pack: Pack, prompts: Prompts) -> Tensor:
        """Hidden states at every step, [N, D]; zeros where there is no context."""
        for rollout in pack.rollouts:
            self.lm.check_media(rollout.sequences, f"the rollout of prompt '{rollout.prompt.id}'")
        sequences = [
            self._sequence(sequence, ids)
            for sequence, ids in zip(pack.sequences, prompts.ids, strict=True)
            if ids is not None
        ]
        valid_N = prompts.valid_N(pack)
        hidden_ND = self.hidden_states(sequences)
        if valid_N is None:
            return hidden_ND
        index_N = valid_N.nonzero().squeeze(-1).to(hidden_ND.device)
        return hidden_ND.new_zeros(len(pack), hidden_ND.shape[1]).index_copy_(0, index_N, hidden_ND)

    def _sequence(self, sequence: TokenSequence, prompt_ids: list[int]) -> TokenSequence:
        """The sequence that the teacher scores: its own rendering of the prompt, then the student's very tokens.

        Replies of an environment within a sequence are as the student read them; stops that the student decided are
        mapped. All ids are the teacher's.
        """
        # The student's prompt may hold ids without a row in this model; the teacher renders its own, from text alone.
        return self.alignment.read(sequence).with_prefix(TokenSequence.of(prompt_ids))

    def _logits(self, head: Head, hidden_CD: Tensor, temperature: float) -> Tensor:
        with torch.no_grad(), self.lm.compute():
            logits_CW = head.logits(hidden_CD, self.alignment.width)
        return self.alignment.logits(logits_CW, temperature)

    def _logits_of(self, head: Head, hidden_CD: Tensor, ids: slice, temperature: float) -> Tensor:
        """Some columns of `_logits`."""
        with torch.no_grad(), self.lm.compute():
            return self.alignment.logits_of(lambda theirs: head.rows(theirs).logits(hidden_CD), ids, temperature)


@torch.no_grad()
def reduced(dense: Dense, needs: frozenset[Need], student_ids_NK: Tensor | None = None) -> TeacherSignal:
    """The smallest signal that meets the needs, computed chunk by chunk.

    Args:
        dense: The whole distribution.
        needs: The needs.
        student_ids_NK: The ids of a need `logp_at`.
    """
    kinds, top_k = {need.kind for need in needs}, max((need.k for need in needs if need.kind == "topk"), default=0)
    blocks: list[dict[str, Tensor]] = []
    start = 0
    for rows in in_blocks(dense, dense.width):
        block = {"sampled": rows.sampled_logp_N}
        here = slice(start, start + len(block["sampled"]))
        if "entropy" in kinds:
            block["entropy"] = rows.entropy_N
        if top_k:
            block["ids"], block["logp"] = rows.topk(top_k)
        if student_ids_NK is not None:
            block["at"] = rows.logp_at(student_ids_NK[here].to(dense.tokens_N.device))
        blocks.append(block)
        start = here.stop
    found = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    tokens_N, valid_N, counts = dense.tokens_N, dense.valid_N, dense.counts
    top = TopK(
        tokens_N,
        dense.source,
        ids_NK=found.get("ids", tokens_N.new_empty(dense.steps, 0)),
        logp_NK=found.get("logp", tokens_N.new_empty(dense.steps, 0, dtype=torch.float32)),
        sampled_logp_N=found["sampled"],
        entropy_N=found.get("entropy"),
        whole=top_k >= dense.width,
        valid_N=valid_N,
        counts=counts,
    )
    if student_ids_NK is None and (top_k or "entropy" in kinds):
        return top
    if student_ids_NK is None:
        return Sampled(tokens_N, dense.source, found["sampled"], valid_N=valid_N, counts=counts)
    ids_NK = student_ids_NK.to(tokens_N.device)
    return Candidates(
        tokens_N, dense.source, ids_NK, found["at"], found["sampled"], top, valid_N=valid_N, counts=counts
    )
