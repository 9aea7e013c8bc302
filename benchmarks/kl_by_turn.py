"""How far a student is from its teacher at each turn of its own episodes.

    python benchmarks/kl_by_turn.py rooms:student rooms:teacher --games 100

The student plays held-out games of the built-in environment; a line per turn: episodes that came to it, reverse KL in
nats per token with its standard error over episodes, and the same over the games that were won.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from retort import config as configuration
from retort.align.chat import rendered
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Rollout
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.rollout.engines.base import Sampling
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.train.models.models import engine, load
from retort.train.setup.prompts import eval_prompts


def reverse_kl_A(rollout: Rollout, student: LanguageModel, teacher: LanguageModel) -> torch.Tensor:
    """KL(student || teacher) at every token that the student decided, nats, [A]."""
    return torch.cat([_of_sequence(sequence, student, teacher) for sequence in rollout.sequences])


@torch.no_grad()
def _of_sequence(sequence: TokenSequence, student: LanguageModel, teacher: LanguageModel) -> torch.Tensor:
    ids_L, decided_L = sequence.tokens_L[None], sequence.action_mask_L
    logp_LV, other_LV = (lm.model(input_ids=ids_L).logits[0].float().log_softmax(-1) for lm in (student, teacher))
    kl_L = (logp_LV.exp() * (logp_LV - other_LV)).sum(-1)
    return kl_L[:-1][decided_L[1:]]


def played(student: LanguageModel, games: int, seed: int) -> list[Rollout]:
    """One episode of each held-out game at temperature 1."""
    config = configuration.resolve(configuration.recipe("rooms"), {"seed": seed, "eval": {"problems": games}})
    prompts = eval_prompts(config, "rooms", [])
    tasks = [
        Task(prompt, rendered(prompt, student.tokenizer), 0, UniformStream(seed, "evaluation", prompt.id))
        for prompt in prompts
    ]
    setup = EpisodeSetup.named("rooms", config.rollout.template_options)
    writer = engine(config, student, len(student.tokenizer))
    return run_episodes(writer, tasks, Sampling(config.rollout.max_new_tokens), setup=setup)


def mean(values: Sequence[float]) -> str:
    """Mean and standard error."""
    if not values:
        return "-"
    values_E = torch.tensor(values, dtype=torch.float64)
    error = f" +- {float(values_E.std()) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{float(values_E.mean()):.3f}{error}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Reverse KL of a student's own episodes by turn.")
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = configuration.resolve(configuration.recipe("rooms"))
    student, teacher = (
        load(config, path, name) for path, name in ((arguments.student, "student"), (arguments.teacher, "teacher"))
    )
    rows: dict[int, list[tuple[float, bool]]] = {}
    rollouts = played(student, arguments.games, arguments.seed)
    for rollout in rollouts:
        kl_A = reverse_kl_A(rollout, student, teacher)
        turn_A = torch.zeros(len(kl_A), dtype=torch.long) if rollout.turn_A is None else rollout.turn_A
        for turn in range(int(turn_A.max()) + 1):
            rows.setdefault(turn, []).append((float(kl_A[turn_A == turn].mean()), rollout.measures["success"] > 0))
    won = sum(rollout.measures["success"] for rollout in rollouts)
    errors = sum(rollout.measures["tool_errors"] for rollout in rollouts)
    print(f"{len(rollouts)} games, {won:.0f} won, {errors / len(rollouts):.2f} invalid calls a game")
    print("| turn | games | reverse KL, nats a token | in games that were won |\n|---|---|---|---|")
    for turn, found in sorted(rows.items()):
        every, winning = [kl for kl, _ in found], [kl for kl, was_won in found if was_won]
        print(f"| {turn + 1} | {len(found)} | {mean(every)} | {mean(winning)} |")


if __name__ == "__main__":
    main()
