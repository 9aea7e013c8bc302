"""A cache of rollouts that are used again: the teacher's completions, and the student's for replay."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retort.align.chat import Renderer
from retort.align.text import completion_text
from retort.core.rollouts import Message, Outcome, Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.errors import UserError
from retort.rollout.plan import RolloutPlan
from retort.train.storage.metrics import JsonLines

FILE = "teacher_rollouts.jsonl"
_PREFIX = "replay/"
#: Key of a completion of the teacher's: prompt, member, temperature and top-p.
Key = tuple[str, int, float, float]


def key(plan: RolloutPlan, prompt: Prompt, member: int) -> Key:
    """The key of the completion that a plan asks for."""
    return prompt.id, member, plan.temperature, plan.top_p


class RolloutCache:
    """A cache of rollouts.

    The teacher's are appended to a file of the run as they come, and cut back to the step that a run is resumed at. The
    student's are few (a replay's capacity) and go into the checkpoint.
    """

    def __init__(self, folder: Path = Path()) -> None:
        """Begins empty; the run's `folder` is written to when the first completion is kept."""
        self.file = JsonLines(folder / FILE)
        self.completions: dict[Key, Rollout] = {}
        self.visits: deque[tuple[Rollout, ...]] = deque()

    def keep(self, rollouts: Sequence[Rollout], plan: RolloutPlan, step: int) -> None:
        """Adds completions of the teacher's; `step` is the number, from 1, of the batch that needed them."""
        for rollout in rollouts:
            _check_media(rollout)
            self.completions[key(plan, rollout.prompt, rollout.member)] = rollout
            generated = rollout.sequence.continuation
            self.file.append(
                {
                    "step": step,
                    "prompt_id": rollout.prompt.id,
                    "member": rollout.member,
                    "temperature": plan.temperature,
                    "top_p": plan.top_p,
                    "status": str(rollout.status),
                    "reward": rollout.reward,
                    **({"reward_parts": dict(rollout.reward_parts)} if rollout.reward_parts else {}),
                    **({"feedback": rollout.feedback} if rollout.feedback else {}),
                    "text": rollout.text,
                    "ids": generated.tokens_L.tolist(),
                    **({} if generated.steps == len(generated) else {"mask": generated.action_mask_L.int().tolist()}),
                    **({} if rollout.turn_A is None else {"turns": rollout.turn_A.tolist()}),
                }
            )

    def remember(self, visits: Sequence[tuple[Rollout, ...]], capacity: int) -> None:
        """Adds visits of the student's; the oldest ones make room."""
        for rollout in (rollout for visit in visits for rollout in visit):
            _check_media(rollout)
        self.visits.extend(visits)
        while len(self.visits) > capacity:
            self.visits.popleft()

    def put(self, visits: Sequence[tuple[Rollout, ...]]) -> None:
        """Replaces all visits of the student's."""
        self.visits = deque(visits)

    def go_back(self, prompts: Sequence[Prompt], render: Renderer, step: int) -> None:
        """Restores the teacher's completions of a step.

        Args:
            prompts: The run's training prompts.
            render: Renders a prompt as the student reads it.
            step: Number of batches done.
        """
        self.file.cut(step)
        self.completions = {}
        named = {prompt.id: prompt for prompt in prompts}
        for row in self.file.rows():
            prompt = named[row["prompt_id"]]
            mask_L = torch.tensor(row.get("mask") or [1] * len(row["ids"])).bool()
            self.completions[prompt.id, row["member"], row["temperature"], row["top_p"]] = Rollout(
                prompt=prompt,
                sequences=(_behind(render(prompt), torch.tensor(row["ids"]), mask_L),),
                turn_A=torch.tensor(row["turns"]) if "turns" in row else None,
                member=row["member"],
                status=Status(row["status"]),
                source="teacher",
                text=row["text"],
                reward=row["reward"],
                reward_parts=row.get("reward_parts", {}),
                feedback=row.get("feedback", ""),
            )

    def tensors(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The student's visits as flat tensors for a checkpoint, empty without any; `prompts` are the training ones."""
        rollouts = [rollout for visit in self.visits for rollout in visit]
        if not rollouts:
            return {}
        rows = {prompt.id: row for row, prompt in enumerate(prompts)}
        for rollout in rollouts:
            if rollout.prompt.messages != prompts[rows[rollout.prompt.id]].messages:
                raise UserError(
                    f"prompt '{rollout.prompt.id}': its environment began with other messages than the data's row; "
                    "such rollouts cannot be kept in a checkpoint (leave out replay)"
                )
        logps = [r.engine_logp_A for r in rollouts if r.engine_logp_A is not None]
        generated = [own for r in rollouts for own in (r.sequences[0].continuation, *r.sequences[1:])]
        several = any(r.splits for r in rollouts)
        found = {
            "sizes": torch.tensor([len(visit) for visit in self.visits]),
            "steps": torch.tensor([r.steps for r in rollouts]),
            "lengths": torch.tensor([len(own) for own in generated]),
            **({"rows": torch.tensor([len(r.sequences) for r in rollouts])} if several else {}),
            **({"histories": _json_bytes([[_said(own) for own in r.histories] for r in rollouts])} if several else {}),
            "ids": torch.cat([own.tokens_L for own in generated]),
            "mask": torch.cat([own.action_mask_L for own in generated]),
            "turns": torch.cat([_turns(r) for r in rollouts]),
            "logp": torch.cat(logps),
            "prompts": torch.tensor([rows[r.prompt.id] for r in rollouts]),
            "members": torch.tensor([r.member for r in rollouts]),
            "visits": torch.tensor([r.visit for r in rollouts]),
            "versions": torch.tensor([r.policy_version for r in rollouts]),
            "statuses": torch.tensor([list(Status).index(r.status) for r in rollouts]),
            "grades": _json_bytes([[r.reward, dict(r.reward_parts), r.feedback] for r in rollouts]),
        }
        if any(rollout.outcomes for rollout in rollouts):
            found["outcomes"] = _json_bytes([[_plain(own) for own in r.outcomes] for r in rollouts])
        return {_PREFIX + name: value for name, value in found.items()}

    def restore(self, prompts: Sequence[Prompt], render: Renderer, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, and ignores those of other parts. `prompts` and `render` are as in `go_back`."""
        self.visits.clear()
        tensors = {name.removeprefix(_PREFIX): x for name, x in tensors.items() if name.startswith(_PREFIX)}
        if not tensors:
            return
        flat = {"ids": "lengths", "mask": "lengths", "logp": "steps", "turns": "steps"}
        lists = {name: values.tolist() for name, values in tensors.items() if name not in flat}
        grades, count = json.loads(bytes(lists["grades"])), len(lists["steps"])
        histories = json.loads(bytes(lists["histories"])) if "histories" in lists else [[]] * count
        ids, masks, logps, turns = (iter(tensors[name].split(lists[sizes])) for name, sizes in flat.items())
        outcomes = json.loads(bytes(lists["outcomes"])) if "outcomes" in lists else [[]] * count
        rollouts: list[Rollout] = []
        for index, rows in enumerate(lists.get("rows", [1] * count)):
            prompt, (reward, parts, feedback) = prompts[lists["prompts"][index]], grades[index]
            before, logp_A, turn_A = render(prompt), next(logps), next(turns)
            written = [(next(ids), next(masks)) for _ in range(rows)]
            decided: list[int] = torch.cat([ids_L[mask_L] for ids_L, mask_L in written]).tolist()
            text = completion_text(render.tokenizer, decided, prompt_ids=before.ids)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sequences=(_behind(before, *written[0]), *(TokenSequence(*row) for row in written[1:])),
                    turn_A=None if bool((turn_A < 0).any()) else turn_A.clone(),
                    engine_logp_A=logp_A.clone(),
                    policy_version=lists["versions"][index],
                    member=lists["members"][index],
                    visit=lists["visits"][index],
                    status=list(Status)[lists["statuses"][index]],
                    text=text,
                    reward=reward,
                    reward_parts=parts,
                    feedback=feedback,
                    histories=tuple(tuple(Message(*own) for own in history) for history in histories[index]),
                    outcomes=tuple(_outcome(*own) for own in outcomes[index]),
                )
            )
        rest = iter(rollouts)
        self.visits.extend(tuple(next(rest) for _ in range(size)) for size in lists["sizes"])


def _behind(before: TokenSequence, ids_L: Tensor, mask_L: Tensor) -> TokenSequence:
    """The generated tokens, and those read in between, after a prompt that is rendered again."""
    return TokenSequence(torch.cat([before.tokens_L, ids_L]), torch.cat([before.action_mask_L, mask_L]), before.media)


def _said(messages: Sequence[Message]) -> list[list[Any]]:
    """Messages as JSON values."""
    return [[own.role, own.content, dict(own.extra)] for own in messages]


def _json_bytes(values: list[Any]) -> Tensor:
    """Plain values as JSON in a tensor, uint8: a checkpoint holds tensors only."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def _plain(own: Outcome) -> list[Any]:
    """An outcome as JSON values; `_outcome` is the way back."""
    return [_said(own.messages), own.reward, dict(own.measures)]


def _outcome(said: list[list[Any]], reward: float | None, measures: dict[str, float]) -> Outcome:
    return Outcome(tuple(Message(*message) for message in said), reward, measures)


def _turns(rollout: Rollout) -> Tensor:
    """Turn of each decided token; -1 where there is but one."""
    return torch.full((rollout.steps,), -1) if rollout.turn_A is None else rollout.turn_A


def _check_media(rollout: Rollout) -> None:
    if any(own.continuation.media for own in rollout.sequences):
        raise UserError(
            f"prompt '{rollout.prompt.id}': an image, a sound or a video was shown between the turns of its rollout; "
            "such rollouts cannot be kept for later (leave out replay, or the teacher's kept completions)"
        )
