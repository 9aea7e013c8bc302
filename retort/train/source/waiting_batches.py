"""Batches that are written and not learnt from yet, as tensors of a checkpoint. Axis letters: see `retort.core`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from retort.core.messages import Message
from retort.core.rollouts import Group, Outcome, Prompt, Rollout, Status, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import TeacherSignal
from retort.errors import RetortError, UserError
from retort.train.source.unended import Unended

_PREFIX = "waiting/"


@dataclass(frozen=True)
class WaitingBatch:
    """A batch that was written.

    Attributes:
        step: Its number, from 0: that of the step that learns from it.
        version: Optimizer steps behind the weights that wrote it.
        groups: Its rollouts.
        given_up: As of `Source`, of this batch.
        failed: As of `Source`, of this batch.
        seconds: How long it took to write.
        signals: What teachers said of it by then, or why they did not; a checkpoint does not hold it.
        asking: How long they took, seconds.
        unended: As of `Source`, of this batch.
    """

    step: int
    version: int
    groups: list[Group]
    given_up: int = 0
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    signals: Mapping[str, TeacherSignal] | RetortError | None = None
    asking: float = 0.0
    unended: Unended = field(default_factory=Unended)


def stored(batches: Sequence[WaitingBatch], prompts: Sequence[Prompt], prefix: str = _PREFIX) -> dict[str, Tensor]:
    """Batches as tensors; none without any.

    Args:
        batches: In order.
        prompts: The training prompts, of which only ids are kept. A conversation with which an environment began is
            kept whole.
        prefix: What the names of the tensors begin with.

    Raises:
        UserError: A rollout holds an image, a sound or a video.
    """
    if not batches:
        return {}
    known = {prompt.id: prompt for prompt in prompts}
    rollouts = [rollout for batch in batches for group in batch.groups for rollout in group]
    for rollout in rollouts:
        if any(own.media for own in rollout.sequences):
            raise UserError(
                f"prompt '{rollout.prompt.id}': its rollout holds an image, a sound or a video, and such a one cannot "
                "wait in a checkpoint; set rollout.staleness=0"
            )
    sequences = [own for rollout in rollouts for own in rollout.sequences]
    logps = [rollout.engine_logp_A for rollout in rollouts if rollout.engine_logp_A is not None]
    turns = [rollout.turn_A for rollout in rollouts if rollout.turn_A is not None]
    plain = [
        {
            "step": batch.step,
            "version": batch.version,
            "given_up": batch.given_up,
            "failed": batch.failed,
            "seconds": batch.seconds,
            "unended": batch.unended.plain(),
            "rollouts": [_plain(rollout, known) for group in batch.groups for rollout in group],
        }
        for batch in batches
    ]
    found = {
        "plain": torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8),
        "ids": torch.cat([own.tokens_L for own in sequences]),
        "mask": torch.cat([own.action_mask_L for own in sequences]),
        "logp": torch.cat(logps) if logps else torch.zeros(0),
        "turns": torch.cat(turns) if turns else torch.zeros(0, dtype=torch.long),
    }
    return {prefix + name: value for name, value in found.items()}


def unstored(tensors: Mapping[str, Tensor], prompts: Sequence[Prompt], prefix: str = _PREFIX) -> list[WaitingBatch]:
    """The batches in tensors of a checkpoint, from which `stored` made some; those of other parts are ignored."""
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    if "plain" not in own:
        return []
    known, plain = {prompt.id: prompt for prompt in prompts}, json.loads(bytes(own["plain"].tolist()))
    rows = [row for batch in plain for row in batch["rollouts"]]
    lengths = [length for row in rows for length in row["lengths"]]
    parts = {name: iter(own[name].split(lengths)) for name in ("ids", "mask")}
    for name in ("logp", "turns"):
        parts[name] = iter(own[name].split([row["steps"] for row in rows if row[name]]))
    return [
        WaitingBatch(
            batch["step"],
            batch["version"],
            in_groups([_rollout(row, known, parts) for row in batch["rollouts"]]),
            batch["given_up"],
            tuple(batch["failed"]),
            batch["seconds"],
            unended=Unended.restored(batch.get("unended", {})),
        )
        for batch in plain
    ]


def _plain(rollout: Rollout, known: Mapping[str, Prompt]) -> dict[str, Any]:
    """All of a rollout but its tensors, as JSON values."""
    return {
        "prompt": rollout.prompt.id,
        "begun": None if known.get(rollout.prompt.id) == rollout.prompt else _begun(rollout.prompt, known),
        "lengths": [len(sequence) for sequence in rollout.sequences],
        "steps": rollout.steps,
        "logp": rollout.engine_logp_A is not None,
        "turns": rollout.turn_A is not None,
        "version": rollout.policy_version,
        "segments": rollout.segments,
        "member": rollout.member,
        "visit": rollout.visit,
        "status": str(rollout.status),
        "source": rollout.source,
        "text": rollout.text,
        "reward": rollout.reward,
        "reward_parts": dict(rollout.reward_parts),
        "feedback": rollout.feedback,
        "measures": dict(rollout.measures),
        "outcomes": [[_said(one.messages), one.reward, dict(one.measures)] for one in rollout.outcomes],
        "histories": [_said(history) for history in rollout.histories],
    }


def _rollout(row: Mapping[str, Any], known: Mapping[str, Prompt], parts: Mapping[str, Iterator[Tensor]]) -> Rollout:
    """The way back from `_plain`, with the next tensors of each kind."""
    prompt = known[row["prompt"]]
    if row["begun"] is not None:
        prompt = _with(prompt, row["begun"])
    return Rollout(
        prompt=prompt,
        sequences=tuple(TokenSequence(next(parts["ids"]).clone(), next(parts["mask"]).clone()) for _ in row["lengths"]),
        turn_A=next(parts["turns"]).clone() if row["turns"] else None,
        engine_logp_A=next(parts["logp"]).clone() if row["logp"] else None,
        policy_version=row["version"],
        segments=tuple((version, tokens) for version, tokens in row.get("segments", ())),
        member=row["member"],
        visit=row["visit"],
        status=Status(row["status"]),
        source=row["source"],
        text=row["text"],
        reward=row["reward"],
        reward_parts=row["reward_parts"],
        feedback=row["feedback"],
        measures=row["measures"],
        outcomes=tuple(Outcome(_messages(said), reward, measures) for said, reward, measures in row["outcomes"]),
        histories=tuple(_messages(history) for history in row["histories"]),
    )


def _begun(prompt: Prompt, known: Mapping[str, Prompt]) -> dict[str, Any]:
    """What an environment made of a row of the data before its episode began; `_with` is the way back.

    Raises:
        UserError: It made more of it than is kept.
    """
    plain = {"messages": _said(prompt.messages), "tools": list(prompt.tools), "privileged": dict(prompt.privileged)}
    if prompt.id not in known or _with(known[prompt.id], plain) != prompt:
        raise UserError(
            f"prompt '{prompt.id}': its environment made another task of it than the data's row, and such a rollout "
            "cannot wait in a checkpoint; set rollout.staleness=0"
        )
    return plain


def _with(prompt: Prompt, begun: Mapping[str, Any]) -> Prompt:
    own = {"messages": _messages(begun["messages"]), "tools": tuple(begun["tools"]), "privileged": begun["privileged"]}
    return replace(prompt, **own)


def _said(messages: Sequence[Message]) -> list[list[Any]]:
    return [[own.role, own.content, dict(own.extra)] for own in messages]


def _messages(said: Sequence[Sequence[Any]]) -> tuple[Message, ...]:
    return tuple(Message(*own) for own in said)
