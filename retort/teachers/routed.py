"""Teachers of which one speaks about each prompt. Axis letters: see `retort.core`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retort.core.needs import SAMPLED
from retort.core.rollouts import Group, Prompt, Rollout
from retort.core.signals import Dense, TeacherSignal, joined
from retort.errors import SignalError
from retort.ranks import here
from retort.teachers.base import ScoreRequest, Teacher
from retort.teachers.local import reduced
from retort.teachers.several import SeveralTeachers, as_asked, one_of, spoken

#: Names the teacher of a prompt.
Route = Callable[[Prompt], str]


class RoutedTeacher(SeveralTeachers):
    """Each prompt has its teacher, who alone scores its rollouts; the others are not asked about them."""

    how = "by prompt"
    # Each step is that of one teacher, so Gaussians over latents stay Gaussians.
    listed = (*SeveralTeachers.listed, "gaussian")

    def __init__(self, teachers: Mapping[str, Teacher], route: Route) -> None:
        """Builds the teacher.

        Args:
            teachers: The teachers by name.
            route: Names the teacher of a prompt, always the same one.
        """
        super().__init__(teachers)
        self.route = route

    def combined(
        self, groups: Sequence[Group], request: ScoreRequest, known: Mapping[str, Dense] | None = None
    ) -> TeacherSignal:
        """See `SeveralTeachers`.

        Raises:
            SignalError: The route leads to no teacher.
        """
        names = list(self.teachers)
        chosen = [self._of(group[0].prompt) for group in groups]
        steps = [sum(rollout.steps for rollout in group) for group in groups]
        group_N = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(steps, dtype=torch.long))
        teacher_N = torch.tensor(chosen, dtype=torch.long)[group_N]
        if known is not None:
            signals: list[TeacherSignal] = [known[name] for name in names]
            whole = joined(signals, teacher_N, torch.arange(len(teacher_N)), self.name)
            return _counted(as_asked(whole, request), signals[:1], names, teacher_N)
        parts: list[TeacherSignal] = []
        place_N, there_N = torch.zeros_like(teacher_N), torch.zeros_like(teacher_N)
        for number, name in enumerate(names):
            mine = [index for index, own in enumerate(chosen) if own == number]
            mine_N = teacher_N == number
            if not mine and here().size > 1:
                # Several ranks ask every teacher as often as one another: models whose layers they share keep step.
                self.teachers[name].score(groups[:1], _about(request, group_N == 0))
            if mine:
                place_N[mine_N], there_N[mine_N] = torch.arange(int(mine_N.sum())), len(parts)
                parts.append(self.teachers[name].score([groups[index] for index in mine], _about(request, mine_N)))
        return _counted(joined(parts, there_N, place_N, self.name), parts, names, teacher_N)

    def _of(self, prompt: Prompt) -> int:
        name = self.route(prompt)
        if name not in self.teachers:
            raise SignalError(f"prompt '{prompt.id}': its teacher '{name}' is none of {', '.join(self.teachers)}")
        return list(self.teachers).index(name)


class BestTeacher(SeveralTeachers):
    r"""The teacher that tells a prompt's rollouts apart as their rewards do.

    Of the rollouts to one prompt it takes the teacher with the largest covariance of rewards and of mean log-probs per
    token. Among right and wrong rollouts that is the teacher of the largest gap of Uni-OPD (arXiv 2605.03677). Where
    all rewards are alike, or one is missing, no teacher is better than another, and the first one speaks.
    """

    how = "the best by reward"

    def combined(
        self, groups: Sequence[Group], request: ScoreRequest, known: Mapping[str, Dense] | None = None
    ) -> TeacherSignal:
        """See `SeveralTeachers`. Every teacher scores every rollout."""
        names = list(self.teachers)
        asked = replace(request, needs=request.needs | {SAMPLED})
        signals = (
            [own.score(groups, asked) for own in self.teachers.values()] if known is None else list(known.values())
        )
        logp_TN = torch.stack([_sampled(signal).cpu() for signal in signals])
        valid_TN = torch.stack([_valid(signal) for signal in signals])
        teacher_N = torch.zeros(logp_TN.shape[1], dtype=torch.long)
        undecided_N, start = torch.zeros_like(teacher_N, dtype=torch.bool), 0
        for group in groups:
            steps = slice(start, start + sum(rollout.steps for rollout in group))
            best = best_of(group, logp_TN[:, steps], valid_TN[:, steps])
            teacher_N[steps], undecided_N[steps] = best or 0, best is None
            start = steps.stop
        found = as_asked(joined(signals, teacher_N, torch.arange(len(teacher_N)), self.name), request)
        return _counted(found, signals[:1], names, teacher_N, undecided=float(undecided_N.sum()))


def best_of(group: Sequence[Rollout], logp_TN: Tensor, valid_TN: Tensor) -> int | None:
    """The teacher whose mean log-probs of some rollouts go best with their rewards; None where nothing tells.

    Args:
        group: The rollouts to one prompt.
        logp_TN: Log-probs of their tokens under each teacher, nats, one rollout after another.
        valid_TN: Where each teacher had a context.
    """
    counted = torch.tensor([rollout.steps for rollout in group])
    number_N = torch.repeat_interleave(torch.arange(len(group)), counted)
    rewards_R = torch.tensor([float("nan") if own.reward is None else own.reward for own in group]).double()
    read_R = torch.ones(len(group), dtype=torch.bool)
    read_R[number_N[~valid_TN.all(0)]] = False
    read_R &= counted > 0
    rewards_R, kept = rewards_R[read_R], read_R.nonzero().squeeze(-1)
    if len(rewards_R) < 2 or bool(rewards_R.isnan().any()) or bool((rewards_R == rewards_R[0]).all()):
        return None
    # A token that a teacher rules out counts as the smallest probability in fp32, so that one does not decide alone.
    finite_TN = logp_TN.double().clamp_min(-100.0)
    mean_TR = torch.stack([finite_TN[:, number_N == int(one)].mean(1) for one in kept], 1)
    gap_T = (mean_TR * (rewards_R - rewards_R.mean())).sum(1)
    return int(gap_T.argmax())


def _about(request: ScoreRequest, mine_N: Tensor) -> ScoreRequest:
    """The request about some of its steps only."""
    ids_NK = request.student_ids_NK
    return request if ids_NK is None else replace(request, student_ids_NK=ids_NK[mine_N])


def _counted(
    signal: TeacherSignal, of: Sequence[TeacherSignal], names: Sequence[str], teacher_N: Tensor, **more: float
) -> TeacherSignal:
    """The signal with the counts of some signals, which are about different rollouts, and of who spoke."""
    total = spoken(names, one_of(teacher_N, len(names)), signal.valid_N) | more
    for name, count in (counted for part in of for counted in part.counts.items()):
        total[name] = total.get(name, 0.0) + count
    return replace(signal, counts=total)


def _sampled(signal: TeacherSignal) -> Tensor:
    """Log-probs of the tokens that were written, [N], nats."""
    kept = reduced(signal, frozenset({SAMPLED})) if isinstance(signal, Dense) else signal
    return kept.rows(slice(0, kept.steps)).sampled_logp_N


def _valid(signal: TeacherSignal) -> Tensor:
    return torch.ones(signal.steps, dtype=torch.bool) if signal.valid_N is None else signal.valid_N.cpu()
