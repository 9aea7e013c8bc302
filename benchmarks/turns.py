"""What it saves that a turn of a conversation reads its new tokens alone, with the keys and values of the turns before.

    python benchmarks/turns.py                    # 48 games of Rooms, and a random model with episodes of 1,000 tokens
    python benchmarks/turns.py --only rooms --rounds 3

Both ways take turns in one process, so whatever else the machine does hits both alike. The last column is the largest
difference of a log-prob from one that is computed anew over the whole sequence, in nats.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import large_vocabulary
import measure
import torch

from retort import config as configuration
from retort.align.chat import rendered
from retort.align.stops import StopTokens
from retort.core.random_streams import UniformStream, uniforms
from retort.core.sequences import TokenSequence
from retort.models.lm import LanguageModel
from retort.models.load import load_model
from retort.rollout.engines.base import Request, Sampling, TurnCache
from retort.rollout.engines.hf import HFEngine
from retort.rollout.episodes import EpisodeSetup, Task, run_episodes
from retort.train.models.models import load
from retort.train.setup.prompts import eval_prompts

#: Sequences and the log-prob of each of their decided tokens.
Played = list[tuple[TokenSequence, torch.Tensor]]


def rooms(games: int) -> tuple[LanguageModel, Callable[[HFEngine], Played]]:
    """The student of Rooms, and what plays games with it."""
    config = configuration.resolve(configuration.recipe("rooms"), {"eval": {"problems": games}})
    lm = load(config, "rooms:student", "student")
    setup = EpisodeSetup.named("rooms", config.rollout.template_options)
    tasks = [
        Task(prompt, rendered(prompt, lm.tokenizer), 0, UniformStream(0, "evaluation", prompt.id))
        for prompt in eval_prompts(config, "rooms", [])
    ]

    def play(engine: HFEngine) -> Played:
        rollouts = run_episodes(engine, tasks, Sampling(config.rollout.max_new_tokens), setup=setup)
        return [(own.sequences[0], own.engine_logp_A) for own in rollouts if own.engine_logp_A is not None]

    return lm, play


def random_model(folder: Path, episodes: int, tokens: int) -> tuple[LanguageModel, Callable[[HFEngine], Played]]:
    """A random model, and what plays conversations of so many tokens: 64 at first, turns of some 24, replies of 40."""
    large_vocabulary.build_pair(folder, vocab=16_384, shapes={"student": (640, 12)})
    lm = load_model(str(folder / "student"), role="student", precision="fp32", device=torch.device("cpu"))
    lm.stops = StopTokens(frozenset(range(0, 16_384, 24)), 0)

    def talk(row: int, turn: int, count: int) -> list[int]:
        return [1 + (7919 * row + 104_729 * turn + 31 * place) % 16_000 for place in range(count)]

    def play(engine: HFEngine) -> Played:
        found = [TokenSequence.of(talk(row, 0, 64)) for row in range(episodes)]
        logps: list[list[torch.Tensor]] = [[] for _ in found]
        caches = [TurnCache() for _ in found]
        turn = 0
        while open_ := [row for row, own in enumerate(found) if len(own) < tokens]:
            turn += 1
            asked = [Request(found[row], uniforms(0, "turns", row, turn, count=256), caches[row]) for row in open_]
            for row, own in zip(open_, engine.generate(asked, Sampling(256)), strict=True):
                found[row] = found[row].then(own.ids, decided=True).then(talk(row, turn, 40))
                logps[row].append(own.logp_A)
        return [(own, torch.cat(logp)) for own, logp in zip(found, logps, strict=True)]

    return lm, play


@torch.no_grad()
def difference(lm: LanguageModel, played: Played) -> float:
    """Largest difference of a log-prob from that of a pass over its whole sequence, nats."""
    found = 0.0
    for sequence, logp_A in played:
        logits_AV = lm.head().logits(lm.hidden([sequence]))[:, : len(lm.tokenizer)].float()
        again_A = logits_AV.log_softmax(-1).gather(1, sequence.actions_A[:, None]).squeeze(1)
        found = max(found, float((again_A - logp_A).abs().max()))
    return found


def measured(name: str, lm: LanguageModel, play: Callable[[HFEngine], Played], rounds: int) -> list[list[object]]:
    """A row of the table for each of the two ways."""
    engines = {way: HFEngine(lm, vocab=len(lm.tokenizer), max_parallel=256) for way in ("anew", "kept")}
    engines["anew"].continues = False
    seconds: dict[str, list[float]] = {way: [] for way in engines}
    read = [0]
    lm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.__setitem__(0, read[0] + kwargs["input_ids"].numel()), with_kwargs=True
    )
    tokens, played = dict[str, int](), dict[str, Played]()
    for number in range(rounds):
        for way, engine in engines.items():
            read[0] = 0
            start = time.perf_counter()
            played[way] = play(engine)
            seconds[way].append(time.perf_counter() - start)
            tokens[way] = read[0]
            measure.progress(f"{name}, {way}, round {number + 1}: {seconds[way][-1]:.1f} s")
    rows: list[list[object]] = []
    for way in engines:
        best, written = min(seconds[way]), sum(len(logp_A) for _, logp_A in played[way])
        ratio = min(seconds["anew"]) / best
        rows.append([name, way, best, written / best, tokens[way], ratio, difference(lm, played[way])])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["rooms", "random"])
    parser.add_argument("--games", type=int, default=48)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    if given.only != "random":
        rows += measured(f"Rooms, {given.games} games", *rooms(given.games), given.rounds)
    if given.only != "rooms":
        with tempfile.TemporaryDirectory() as folder:
            lm, play = random_model(Path(folder), given.episodes, given.tokens)
            name = f"{lm.parameters / 1e6:.0f}M, {given.episodes} episodes of {given.tokens:,} tokens"
            rows += measured(name, lm, play, given.rounds)
    print(measure.in_words(measure.machine("cpu", 1)))
    header = [
        "",
        "turns before",
        "seconds",
        "generated tokens/s",
        "tokens computed",
        "times as fast",
        "difference, nats",
    ]
    print(measure.markdown(header, rows))


if __name__ == "__main__":
    main()
