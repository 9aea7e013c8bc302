"""Records of a step's rollouts: means, and a few rollouts token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from retort.core.random_streams import permutation
from retort.core.rollouts import RIGHT_FROM, Pack, Rollout, Status
from retort.core.signals import TeacherSignal
from retort.loss.terms import UNITS
from retort.rollout.record import token_row
from retort.teachers.base import Teacher
from retort.teachers.view import View
from retort.train.learning.passes import Batch
from retort.train.output.graded import against_verifier
from retort.train.output.units import unit_rows
from retort.train.storage.metrics import Means


def rows(
    batch: Batch,
    values: Mapping[str, Tensor],
    step: int,
    count: int,
    tokenizer: Any,
    teachers: Mapping[str, Teacher] | None = None,
) -> list[dict[str, Any]]:
    """Lines of `rollouts.jsonl` for one step; which rollouts is drawn by seed.

    Args:
        batch: The scored rollouts.
        values: Per-step values, [N] each.
        step: The step's number, from 1.
        count: Number of rollouts.
        tokenizer: The student's.
        teachers: The teacher of each view, of which those with another tokenizer add the units (`unit_rows`).
    """
    pack = batch.pack
    chosen = permutation(batch.clock.seed, "record", step, count=len(pack.rollouts))[:count]
    apart = {name for view in batch.method.views if (name := f"{view}{UNITS}") in values}
    columns = {name.removeprefix("watch."): values_N for name, values_N in values.items() if name not in apart}
    shown = any(view.images == "teacher" for view in batch.method.views.values())
    found: list[dict[str, Any]] = []
    for index in sorted(chosen):
        own = {name: values[name][pack.steps_of([index])] for name in apart}
        units = unit_rows(pack.rollouts[index], own, teachers or {})
        row = token_row(pack, index, columns, tokenizer)
        if not shown:  # the data have such images, but no teacher of this run sees them
            row.pop("teacher_images", None)
        found.append({"step": step, **row, **({"units": units} if units else {})})
    return found


def rollout_metrics(batch: Batch, version: int) -> dict[str, float]:
    """Means over a step's rollouts: the student's under plain names, the teacher's with a prefix, and their shares."""
    means, rollouts = Means(), batch.pack.rollouts
    for rollout in rollouts:
        if rollout.source == "dataset" or _replayed(rollout, version):
            continue
        if rollout.segments:
            means.add("partial/segments", len(rollout.segments))
        prefix = "" if rollout.source == "student" else "teacher/"
        means.add(f"{prefix}length", rollout.steps)
        means.add(f"{prefix}truncated_fraction", float(rollout.status == Status.TRUNCATED))
        if rollout.reward is not None:
            means.add(f"{prefix}reward", rollout.reward)
        for name, value in rollout.measures.items():
            means.add(f"{prefix}{name}", value)
        for part, value in rollout.reward_parts.items():
            means.add(f"{prefix}reward/{part}", value)
    found = means.values() | _group_metrics(batch.pack) | _splits(rollouts) | against_verifier(batch.pack)
    replayed = sum(_replayed(rollout, version) for rollout in rollouts)
    return found | {"replayed_fraction": replayed / len(rollouts)} if replayed else found


def _replayed(rollout: Rollout, version: int) -> bool:
    """Whether it is of an earlier batch; one in segments was learnt from in none before."""
    return rollout.source == "student" and rollout.policy_version != version and not rollout.segments


def _splits(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """How often a conversation was rendered anew, a mean over the rollouts; nothing where none was."""
    splits = sum(rollout.splits for rollout in rollouts)
    return {"splits": splits / len(rollouts)} if splits else {}


def _group_metrics(pack: Pack) -> dict[str, float]:
    """Shares of groups with several graded completions: with a right one; with both kinds, which GRPO learns from."""
    rewards_R, group_R = pack.reward_R, pack.group_R
    groups: list[Tensor] = [rewards_R[group_R == group] for group in group_R.unique()]
    found = [own_M >= RIGHT_FROM for own_M in groups if len(own_M) > 1 and not bool(own_M.isnan().any())]
    if not found:
        return {}
    solved = [bool(right_M.any()) for right_M in found]
    mixed = [some and not bool(right_M.all()) for some, right_M in zip(solved, found, strict=True)]
    return {
        "success_group_fraction": sum(solved) / len(found),
        "mixed_group_fraction": sum(mixed) / len(found),
    }


def view_metrics(signals: Mapping[str, TeacherSignal], views: Mapping[str, View], rollouts: int) -> dict[str, float]:
    """Means over the prompts of views other than the student's own, as `view/<name>/<what>`.

    Of a teacher with another tokenizer also shares of the completions' bytes: `one_to_one` (a token on both sides),
    `spans` (units of several), `unread` (in no unit, see docs/tokenizers.md).

    `no_context`, `cut` and `shows/<template>` (such as `success`, `failure`, `feedback`) are shares of the rollouts,
    `prompt_tokens` is a mean over those with a context.

    Of several teachers `teacher_share/<name>`, the share of the tokens at which each spoke, and of those that no reward
    decided `teacher_share_undecided`.
    """
    found = _spoken(signals)
    for name, signal in signals.items():
        parts = {what: signal.counts.get(f"bytes_{what}", 0.0) for what in ("one_to_one", "spans", "unread")}
        if total := sum(parts.values()):
            found |= {f"view/{name}/{what}": count / total for what, count in parts.items()}
        if views[name].render is None or not signal.counts:
            continue
        left_out = signal.counts.get("no_context", 0.0)
        if "no_context" in signal.counts:
            found[f"view/{name}/no_context"] = left_out / rollouts
        for what, count in signal.counts.items():
            if what == "cut" or what.startswith("shows/"):
                found[f"view/{name}/{what}"] = count / rollouts
        if rollouts > left_out and "prompt_tokens" in signal.counts:
            found[f"view/{name}/prompt_tokens"] = signal.counts["prompt_tokens"] / (rollouts - left_out)
    return found


def _spoken(signals: Mapping[str, TeacherSignal]) -> dict[str, float]:
    """How often each of several teachers spoke, over all views of them."""
    counts = [signal.counts for signal in signals.values()]
    total: dict[str, float] = {}
    for name, count in ((name, count) for own in counts for name, count in own.items()):
        if name.startswith("spoke/"):
            total[name.removeprefix("spoke/")] = total.get(name.removeprefix("spoke/"), 0.0) + count
    tokens = sum(total.values())
    if not tokens:
        return {}
    found = {f"teacher_share/{name}": count / tokens for name, count in total.items()}
    undecided = [own["undecided"] for own in counts if "undecided" in own]
    return found | ({"teacher_share_undecided": sum(undecided) / tokens} if undecided else {})
