"""The check of a run without its teachers: whether the scores of the data's completions are stored."""

from __future__ import annotations

from collections.abc import Mapping

from retort.cache.teacher import CachedTeacher
from retort.core.needs import Need
from retort.core.rollouts import Group, Rollout, in_groups
from retort.errors import UserError
from retort.method import Method
from retort.models.stored import StoredModel
from retort.teachers.base import ScoreRequest
from retort.train.setup.prepare import Prepared
from retort.train.teaching.teachers import Teachers


def need_scores(prepared: Prepared) -> None:
    """Refuses a run some of whose scores are not stored, and would be missed in the middle of it.

    It looks at phases that learn from nothing but the data's completions, at one length.

    Raises:
        UserError: Scores of some rows are not stored, and their model is not loaded.
    """
    source, teachers = prepared.source, prepared.teachers
    for _, method in prepared.phases:
        plan = method.rollout
        if plan.sources != {"dataset"} or plan.horizon is not None:
            continue
        rollouts = [source.response_rollout(prompt, 0, source.limit) for prompt in source.prompts]
        for needs in teachers.all_wanted(method):
            _need(teachers, method, in_groups(rollouts), needs)


def _need(teachers: Teachers, method: Method, groups: list[Group], needs: Mapping[str, frozenset[Need]]) -> None:
    if teachers.cached is None:
        return
    for view, own in needs.items():
        teacher = teachers.cached.teachers.get(method.views[view].model)
        lm = teachers.lms.get(method.views[view].model)
        if not isinstance(teacher, CachedTeacher) or not isinstance(lm, StoredModel):
            continue
        request = ScoreRequest(method.views[view], own, method.temperature)
        missing: list[Rollout] = teacher.missing(groups, request)
        if missing:
            wanted = ", ".join(str(need) for need in sorted(own))
            raise UserError(
                f"the model {lm.name} is not loaded (cache.only=true), and of {len(missing)} of {len(groups)} rows "
                f"('{missing[0].prompt.id}' first) the cache does not hold: {wanted}; store it with `retort score` and "
                f"the settings of this run, or load the model (cache.only=false)"
            )
