"""Completions that the teacher generates for the student to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retort.align.chat import Renderer
from retort.align.pair import Alignment
from retort.align.spanned import Unspelt
from retort.align.stops import StopTokens
from retort.core.rollouts import Rollout, Status
from retort.errors import SignalError
from retort.rollout.engines.base import Engine, Sampling
from retort.rollout.episodes import Task, run_episodes


class TeacherGenerator:
    """Generates completions with the teacher, under the teacher's rendering of a prompt, for the student's context.

    For the student, the teacher's completion ends in the student's stop token, and nothing follows one.
    """

    def __init__(self, engine: Engine, render: Renderer, *, alignment: Alignment, student_stops: StopTokens) -> None:
        """Builds the generator.

        Args:
            engine: The teacher's engine, over the ids that the alignment reads.
            render: Gives a prompt's ids in the teacher's rendering.
            alignment: The alignment of the student and the teacher.
            student_stops: Tokens that end the student's completions.
        """
        self.engine = engine
        self.render = render
        self.alignment = alignment
        self.student_stops = student_stops

    def generate(self, tasks: Sequence[Task], sampling: Sampling) -> list[Rollout]:
        """Generates completions in order, as rollouts in the student's ids; the context of a task is the student's.

        They have no log-probs of an engine, because those would be the teacher's.
        """
        own = [replace(task, context=self.render(task.prompt)) for task in tasks]
        generated = run_episodes(self.engine, own, sampling, source="teacher")
        return [self.as_read(task, rollout) for task, rollout in zip(tasks, generated, strict=True)]

    def as_read(self, task: Task, rollout: Rollout) -> Rollout:
        """The teacher's completion, turn by turn, as the student reads it after its own prompt.

        Where a turn ends earlier for the student, so does the rollout, because no reply was made to that.
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
        return replace(rollout, sequences=(sequence,), turn_A=turn_A, engine_logp_A=None, status=status)

    def translated(self, ids: Sequence[int], status: Status) -> tuple[list[int], Status]:
        """A turn of the teacher's in the student's ids, with the student's stop.

        Where the student's tokenizer cannot spell all of it, it ends before that, as if it had been cut off.
        """
        swap = self.alignment.stops.swap
        try:
            read = [swap.get(token, token) for token in self._ours(ids)]
        except Unspelt as error:
            return error.before, Status.TRUNCATED
        stops = self.student_stops
        if status == Status.COMPLETED and read[-1] not in stops.ids:
            read[-1] = stops.primary  # the last id is one of the teacher's further stops
        for index, token in enumerate(read):
            if token in stops.ids:
                return read[: index + 1], Status.COMPLETED
        return read, status

    def _ours(self, ids: Sequence[int]) -> list[int]:
        found = self.alignment.to_student(ids)
        if -1 in found:
            raise SignalError(f"the student has no id for the token with the teacher's id {ids[found.index(-1)]}")
        return found
