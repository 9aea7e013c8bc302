"""Answers that the teacher writes for the student to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retort.align.chat import Renderer
from retort.align.pair import Alignment
from retort.align.stops import StopTokens
from retort.core.rollouts import Rollout, Status
from retort.core.sequences import TokenSequence
from retort.errors import SignalError
from retort.rollout.engines.base import Engine, Sampling
from retort.rollout.episodes import Task, run_episodes


class TeacherWriter:
    """The teacher as a writer: it answers its own rendering of a prompt; the student reads that answer after its own.

    What the teacher wrote ends, for the student, in the student's stop token, and nothing follows one.
    """

    def __init__(self, engine: Engine, render: Renderer, *, alignment: Alignment, student_stops: StopTokens) -> None:
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

    def write(self, tasks: Sequence[Task], sampling: Sampling) -> list[Rollout]:
        """Answers in order, as rollouts of the student's; the context of a task is the student's, as always.

        They carry no log-probs of an engine: those would be the teacher's.
        """
        own = [replace(task, context=TokenSequence.of(self.render(task.prompt))) for task in tasks]
        written = run_episodes(self.engine, own, sampling, source="teacher")
        return [self.as_read(task, rollout) for task, rollout in zip(tasks, written, strict=True)]

    def as_read(self, task: Task, rollout: Rollout) -> Rollout:
        """What the teacher wrote, turn by turn, as the student reads it behind its own prompt.

        Where a turn ends earlier for the student, so does the rollout: no reply was made to that.
        """
        pieces = rollout.sequence.continuation.pieces()
        sequence, status = task.context, rollout.status
        for number, piece in enumerate(pieces):
            ids: list[int] = piece.tokens_L.tolist()
            if not piece.steps:
                sequence = sequence.then(self._ours(ids), media=piece.media)
                continue
            last = number == len(pieces) - 1
            read, ended = self.translated(ids, rollout.status if last else Status.COMPLETED)
            sequence = sequence.then(read, decided=True)
            if last or len(read) < len(ids):
                status = ended
                break
        turn_A = None if rollout.turn_A is None else rollout.turn_A[: sequence.steps]
        return replace(rollout, sequence=sequence, turn_A=turn_A, engine_logp_A=None, status=status)

    def translated(self, ids: Sequence[int], status: Status) -> tuple[list[int], Status]:
        """A turn of the teacher's as the student would have written it."""
        swap = self.alignment.stops.swap
        read = [swap.get(token, token) for token in self._ours(ids)]
        stops = self.student_stops
        if status == Status.COMPLETED and read[-1] not in stops.ids:
            read[-1] = stops.primary  # one of the teacher's further stops
        for place, token in enumerate(read):
            if token in stops.ids:
                return read[: place + 1], Status.COMPLETED
        return read, status

    def _ours(self, ids: Sequence[int]) -> list[int]:
        found = self.alignment.ours(ids)
        if -1 in found:
            raise SignalError(f"the student has no id for the token with the teacher's id {ids[found.index(-1)]}")
        return found
