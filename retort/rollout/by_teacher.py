"""Answers that the teacher writes for the student to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from retort.align.chat import Renderer
from retort.align.pair import Alignment
from retort.align.stops import StopTokens
from retort.rollout.engines.hf import HFEngine
from retort.rollout.single_turn import Task, acted, write
from retort.types import Rollout, Status


class TeacherWriter:
    """The teacher as a writer: it answers its own rendering of a prompt; the student reads that answer after its own.

    What the teacher wrote ends, for the student, in the student's stop token, and nothing follows one.
    """

    def __init__(self, engine: HFEngine, render: Renderer, *, alignment: Alignment, student_stops: StopTokens) -> None:
        """A writer.

        Args:
            engine: Of the teacher, over the ids that the alignment reads.
            render: A prompt's ids, as the teacher sees it.
            alignment: Of the student and the teacher.
            student_stops: Where the student's answers end.
        """
        self.engine = engine
        self.render = render
        self.alignment = alignment
        self.student_stops = student_stops

    def write(self, tasks: Sequence[Task], *, max_new_tokens: int, temperature: float, top_p: float) -> list[Rollout]:
        """Answers in order, as rollouts of the student's; `prompt_ids` of a task are the student's, as always.

        They carry no log-probs of an engine: those would be the teacher's.
        """
        own = [replace(task, prompt_ids=self.render(task.prompt)) for task in tasks]
        written = write(
            self.engine, own, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, source="teacher"
        )
        return [self._read(task, rollout) for task, rollout in zip(tasks, written, strict=True)]

    def _read(self, task: Task, rollout: Rollout) -> Rollout:
        ids, status = self.translated(rollout.action_ids, rollout.status)
        return replace(
            rollout,
            tokens_L=torch.tensor([*task.prompt_ids, *ids]),
            acted_L=acted(len(task.prompt_ids), len(ids)),
            engine_logp_A=None,
            status=status,
        )

    def translated(self, ids: Sequence[int], status: Status) -> tuple[list[int], Status]:
        """An answer of the teacher's as the student would have written it."""
        swap = self.alignment.stops.swap
        read = [swap.get(token, token) for token in self.alignment.ours(ids)]
        stops = self.student_stops
        if status == Status.COMPLETED and read[-1] not in stops.ids:
            read[-1] = stops.primary  # one of the teacher's further stops
        for place, token in enumerate(read):
            if token in stops.ids:
                return read[: place + 1], Status.COMPLETED
        return read, status
