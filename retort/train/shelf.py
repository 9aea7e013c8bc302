"""What was written before and is used again: the teacher's kept answers, and the student's for replay."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from retort.align.text import completion_text
from retort.rewards.verify import parts_of
from retort.rollout.plan import RolloutPlan
from retort.rollout.single_turn import acted
from retort.train.metrics import JsonLines
from retort.train.setup import Setup
from retort.types import Prompt, Rollout, Status

FILE = "teacher_rollouts.jsonl"
_PREFIX = "replay/"
#: Which answer of the teacher's: prompt, member, and the temperature and nucleus that it was drawn at.
Key = tuple[str, int, float, float]


def key(plan: RolloutPlan, prompt: Prompt, member: int) -> Key:
    """The answer that a plan wants."""
    return prompt.id, member, plan.temperature, plan.top_p


class Shelf:
    """Kept answers.

    The teacher's are appended to a file of the run as they come, and cut back to the step that a run is resumed at. The
    student's are few (a replay's capacity) and go into the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing kept yet."""
        self.file = JsonLines(folder / FILE)
        self.answers: dict[Key, Rollout] = {}
        self.visits: deque[tuple[Rollout, ...]] = deque()

    def keep(self, rollouts: Sequence[Rollout], plan: RolloutPlan, step: int) -> None:
        """Puts answers of the teacher's on the shelf; `step` is the number, from 1, of the batch that needed them."""
        for rollout in rollouts:
            self.answers[key(plan, rollout.prompt, rollout.member)] = rollout
            self.file.append(
                {
                    "step": step,
                    "prompt_id": rollout.prompt.id,
                    "member": rollout.member,
                    "temperature": plan.temperature,
                    "top_p": plan.top_p,
                    "status": str(rollout.status),
                    "reward": rollout.reward,
                    "text": rollout.text,
                    "ids": rollout.action_ids,
                }
            )

    def remember(self, visits: Sequence[tuple[Rollout, ...]], capacity: int) -> None:
        """Puts visits of the student's on the shelf; the oldest make room."""
        self.visits.extend(visits)
        while len(self.visits) > capacity:
            self.visits.popleft()

    def go_back(self, setup: Setup, step: int) -> None:
        """The teacher's answers as they were after a step."""
        self.file.cut(step)
        self.answers = {}
        prompts = {prompt.id: prompt for prompt in setup.train}
        for row in self.file.rows():
            prompt = prompts[row["prompt_id"]]
            before, ids = setup.render(prompt), row["ids"]
            self.answers[prompt.id, row["member"], row["temperature"], row["top_p"]] = Rollout(
                prompt=prompt,
                tokens_L=torch.tensor([*before, *ids]),
                acted_L=acted(len(before), len(ids)),
                member=row["member"],
                status=Status(row["status"]),
                source="teacher",
                text=row["text"],
                reward=row["reward"],
                reward_parts=parts_of(setup.verifier, prompt, row["text"]),
            )

    def tensors(self, setup: Setup) -> dict[str, Tensor]:
        """The student's visits, flat, for a checkpoint; empty if there are none."""
        rollouts = [rollout for visit in self.visits for rollout in visit]
        if not rollouts:
            return {}
        places = {prompt.id: place for place, prompt in enumerate(setup.train)}
        logps = [r.engine_logp_A for r in rollouts if r.engine_logp_A is not None]
        found = {
            "sizes": torch.tensor([len(visit) for visit in self.visits]),
            "steps": torch.tensor([r.steps for r in rollouts]),
            "ids": torch.tensor([token for r in rollouts for token in r.action_ids]),
            "logp": torch.cat(logps),
            "prompts": torch.tensor([places[r.prompt.id] for r in rollouts]),
            "members": torch.tensor([r.member for r in rollouts]),
            "visits": torch.tensor([r.visit for r in rollouts]),
            "versions": torch.tensor([r.policy_version for r in rollouts]),
            "completed": torch.tensor([r.status == Status.COMPLETED for r in rollouts]),
            "rewards": torch.tensor([math.nan if r.reward is None else r.reward for r in rollouts]).double(),
        }
        return {_PREFIX + name: value for name, value in found.items()}

    def restore(self, setup: Setup, tensors: Mapping[str, Tensor]) -> None:
        """Puts `tensors` back; those of others are not looked at."""
        self.visits.clear()
        tensors = {name.removeprefix(_PREFIX): x for name, x in tensors.items() if name.startswith(_PREFIX)}
        if not tensors:
            return
        lists = {name: values.tolist() for name, values in tensors.items() if name != "logp"}
        pieces = zip(tensors["ids"].split(lists["steps"]), tensors["logp"].split(lists["steps"]), strict=True)
        rollouts: list[Rollout] = []
        for index, (ids_A, logp_A) in enumerate(pieces):
            prompt, reward = setup.train[lists["prompts"][index]], lists["rewards"][index]
            before, ids = setup.render(prompt), ids_A.tolist()
            text = completion_text(setup.student.tokenizer, ids, prompt_ids=before)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    tokens_L=torch.tensor([*before, *ids]),
                    acted_L=acted(len(before), len(ids)),
                    engine_logp_A=logp_A.clone(),
                    policy_version=lists["versions"][index],
                    member=lists["members"][index],
                    visit=lists["visits"][index],
                    status=Status.COMPLETED if lists["completed"][index] else Status.TRUNCATED,
                    text=text,
                    reward=None if math.isnan(reward) else reward,
                    reward_parts=parts_of(setup.verifier, prompt, text),
                )
            )
        rest = iter(rollouts)
        self.visits.extend(tuple(next(rest) for _ in range(size)) for size in lists["sizes"])
