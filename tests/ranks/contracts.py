"""What `torchrun` starts to run the contract tests on two ranks: the same functions, with implementations divided.

    torchrun --nproc-per-node 2 tests/ranks/contracts.py FOLDER

A teacher is asked by each rank about its own groups, an engine writes on each rank its part of the requests, a grader
grades on each rank its part of the groups; put together, that has to pass as what one process makes does. Every rank
runs every test, in the same order: all ask together.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import image_models
import pytest
import support
import torch
from torch import Tensor

from retort import ranks
from retort.cli import main as command
from retort.core.rollouts import Group, Message, Prompt, Rollout
from retort.core.signals import Candidates, Dense, Differing, Sampled, TeacherSignal, TopK
from retort.errors import SignalError, UserError
from retort.rewards import Grade, Grader, base
from retort.rewards.user import user_grader
from retort.rollout.engines.base import Completion, Engine, Request, Sampling
from retort.rollout.episodes import EpisodeSetup, run_episodes
from retort.teachers.base import ScoreRequest, Teacher

CONTRACTS = Path(__file__).parents[1] / "contracts"
#: A rank has to have a part in these; alignments, and how one rank reads a sequence, are the same on any number.
DIVIDED = (
    "test_teacher.py",
    "test_engine.py",
    "test_grader.py",
    "test_sequences.py::test_every_teacher_reads_what_the_student_read",
    "test_sequences.py::test_the_judge_compares_behind_all_that_was_read",
)


class DividedTeacher:
    """Says what a teacher says that every rank asks about its share of the groups."""

    def __init__(self, behind: Teacher) -> None:
        self.behind, self.name, self.capabilities = behind, behind.name, behind.capabilities

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        share = ranks.Share.of(groups, ranks.here())
        asked, ids_NK = groups[share.groups], request.student_ids_NK
        count = sum(rollout.steps for group in asked for rollout in group)
        if ids_NK is not None:
            request = replace(request, student_ids_NK=ids_NK[share.first : share.first + count])
        said = self.behind.score(asked, request)
        mine = slice(share.steps.start - share.first, share.steps.stop - share.first) if share.rollouts else slice(0, 0)
        parts = share.world.each(lambda: plain(said, mine))
        valid_N = share.valid({"view": said.valid_N})["view"]
        return replace(joined(parts), valid_N=valid_N, counts=share.counts([said.counts])[0])


def plain(signal: TeacherSignal, mine: slice) -> TeacherSignal | dict[str, Any]:
    """The rank's own steps of a signal, with nothing that cannot be sent."""
    own = signal.select(torch.arange(signal.steps)[mine])
    if isinstance(own, Differing):
        return {"of": plain(own.of, slice(None)), "disagreement_N": own.disagreement_N}
    if not isinstance(own, Dense):
        return own
    try:
        hidden_ND = own.hidden_states() if own.hidden is not None else None
    except SignalError:
        hidden_ND = None
    logits_NV = own.logits(slice(0, own.steps))
    return {
        "logits_NV": logits_NV, "tokens_N": own.tokens_N, "source": own.source, "temperature": own.temperature,
        "hidden_ND": hidden_ND,
    }  # fmt: skip


def joined(parts: Sequence[Any]) -> TeacherSignal:
    """One signal about the steps of all parts."""
    first = parts[0]
    if isinstance(first, dict) and "of" in first:
        return Differing.beside(
            joined([part["of"] for part in parts]), torch.cat([part["disagreement_N"] for part in parts])
        )
    if isinstance(first, dict):
        whole = {
            n: v if v is None or isinstance(v, str | float) else torch.cat([p[n] for p in parts])
            for n, v in first.items()
        }
        return Dense.of(whole.pop("logits_NV"), whole.pop("tokens_N"), **whole)
    found = {
        name: torch.cat([vars(part)[name] for part in parts])
        for name, value in vars(first).items()
        if isinstance(value, Tensor) and name != "valid_N"
    }
    if isinstance(first, Candidates) and first.top is not None:
        found["top"] = joined([part.top for part in parts])
    assert isinstance(first, Sampled | TopK | Candidates)
    return replace(first, valid_N=None, **found)


class DividedEngine:
    """Writes on every rank its part of the requests."""

    def __init__(self, behind: Engine) -> None:
        self.behind = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return ranks.here().divide(requests, partial(self.behind.generate, sampling=sampling), key=id)


class DividedGrader(Grader):
    """Grades each group on one rank, in turn."""

    def __init__(self, behind: Grader) -> None:
        self.behind, self.calls = behind, 0
        self.can_grade, self.start_batch = behind.can_grade, behind.start_batch

    @property
    def name(self) -> str:
        return self.behind.name

    @property
    def explains(self) -> bool:
        return self.behind.explains

    @property
    def given_up(self) -> int:
        return sum(ranks.here().each(lambda: self.behind.given_up))

    def grade(self, group: Group) -> list[Grade | None]:
        world, self.calls = ranks.here(), self.calls + 1
        whose = self.calls % world.size
        return world.each(lambda: self.behind.grade(group) if world.rank == whose else [])[whose]


def by_visit(item: Any) -> tuple[str, int]:
    return item.prompt.id, item.visit


def divided_graded(grader: Grader, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """`graded`, by every rank its part of the visits."""
    own = grader.behind if isinstance(grader, DividedGrader) else grader
    found = ranks.here().divide(rollouts, lambda part: base.graded(own, part), key=by_visit)
    pairs = list(zip(rollouts, found, strict=True))
    assert all(torch.equal(one.sequence.tokens_L, other.sequence.tokens_L) for one, other in pairs)
    return [replace(other, sequences=one.sequences) for one, other in pairs]  # equal is what is the same object


class Divide:
    """A plugin that puts the divided implementations into the lists of the contract tests."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module.__name__: item.module for item in items}.values():
            for kind, divide in KINDS.items():
                for name, made in getattr(module, kind, {}).items():
                    getattr(module, kind)[name] = divide(made)
            if hasattr(module, "GRADERS"):
                module.graded = divided_graded

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.when == "call" and report.passed


def teacher(made: Any) -> Any:
    """Of `test_teacher` it is a function of a model to a `Made`; of `test_sequences` a tuple, of one to a teacher.

    A signal of units holds functions, which cannot be sent, so its teacher is asked whole on every rank here; runs with
    one, divided, are compared in `test_ranks`.
    """
    if isinstance(made, tuple):
        make, *rest = made
        return (lambda lm: DividedTeacher(make(lm)), *rest)
    return lambda lm: found if (found := made(lm)).of_units else replace(found, teacher=DividedTeacher(found.teacher))


def engine(made: Any) -> Any:
    return lambda *more: replace(found := made(*more), engine=DividedEngine(found.engine))


def grader(made: Any) -> Any:
    make, prompt = made
    return (lambda: DividedGrader(make())), prompt


KINDS: dict[str, Callable[[Any], Any]] = {"TEACHERS": teacher, "ENGINES": engine, "GRADERS": grader}


# --- and what has no list of its own ---


def test_episodes_are_those_of_one_process() -> None:
    import test_environment as one

    script = one.script("3", "9", "the answer 7")
    prompts = [replace(one.ASKED, id=f"p{number}", answer=str(number)) for number in (3, 9, 7)]
    asked = [task for prompt in prompts for task in one.tasks(script, 2, prompt)]

    def played(game: Any, tasks: Sequence[Any]) -> list[Rollout]:
        return run_episodes(script, tasks, Sampling(20), setup=EpisodeSetup(game))

    game = one.Guess()
    found = ranks.here().divide(asked, lambda own: played(game, own), key=by_visit)
    for mine, alone in zip(found, played(one.Guess(), asked), strict=True):
        assert mine.sequence.tokens_L.tolist() == alone.sequence.tokens_L.tolist()
        assert (mine.prompt, mine.member, mine.text, mine.reward) == (
            alone.prompt, alone.member, alone.text, alone.reward
        )  # fmt: skip
    games = ranks.here().each(lambda: len(game.games))
    assert sum(games) == len(asked)
    assert min(games) > 0


def test_a_grader_that_fails_on_one_rank_fails_on_all() -> None:
    def fails(prompt: Prompt, completion: str) -> float:
        if prompt.id == "p2":
            raise ValueError("no such answer")
        return 1.0

    prompts = [Prompt(f"p{number}", (Message("user", "1 ="),)) for number in range(3)]
    own = user_grader(fails, "own", prompts[0])
    with pytest.raises(UserError, match="no such answer"):
        divided_graded(own, [rollout for prompt in prompts for rollout in support.group_of(prompt, ["1", "2"])])


def test_a_thread_with_a_lane_exchanges_beside_the_main_thread() -> None:
    """The ranks exchange in other orders: the second one's main thread waits until its other thread is done."""
    world, found = ranks.here(), list[list[tuple[str, int, int]]]()
    within = world.lane()

    def several(name: str) -> list[list[tuple[str, int, int]]]:
        return [world.each(lambda n=n: (name, n, world.rank)) for n in range(20)]

    def other() -> None:
        with within():
            found.extend(several("other"))

    thread = threading.Thread(target=other)
    thread.start()
    if world.rank:
        thread.join()
    mine = several("main")
    thread.join()
    for name, own in (("main", mine), ("other", found)):
        assert own == [[(name, n, rank) for rank in range(world.size)] for n in range(20)]


def refuses_two(prompt: Prompt, completion: str) -> float:
    """A verifier of the user's."""
    if completion and prompt.messages[0].content.startswith("2"):
        raise ValueError("two is not graded")
    return 0.0


def test_a_verifier_that_fails_on_one_rank_ends_all_with_one_line(
    tiny_run: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last test: whoever has spoken once stays silent."""
    world, data, out = ranks.here(), tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"{number} + 1 ="}) + "\n" for number in (1, 2)))
    given = {"student": tiny_run["student"], "teacher": tiny_run["teacher"], "data": str(data), "out": str(out)}
    options = [f"--{name}={value}" for name, value in world.agree(given).items()]
    words = ["task=contracts:refuses_two", "rollout.prompts=2", "rollout.max_new_tokens=4", "eval.problems=0"]
    capfd.readouterr()
    assert command(["train", *options, *words, "checks=skip", "device=cpu", "precision=fp32", "steps=2"]) == 2
    said = [line for part in world.each(lambda: capfd.readouterr().err) for line in part.splitlines()]
    (line,) = [line for line in said if line.startswith("retort: ")]
    assert "two is not graded" in line
    assert "everything is saved at step 0 of 2, go on with: " in line
    assert (Path(world.agree(given)["out"]) / "checkpoints" / "step-0").is_dir()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    world, divide = ranks.join(), Divide()
    sys.path[:0] = [str(CONTRACTS)]
    made, narrower = support.make_model, support.make_narrower  # transformers writes a model on the first rank alone
    support.make_model = lambda folder, **given: world.first(lambda: made(folder, **given))
    support.make_narrower = lambda *given: world.first(lambda: narrower(*given))
    seeing = image_models.make_image_model
    image_models.make_image_model = lambda *given, **more: world.first(lambda: seeing(*given, **more))
    words = [
        "-x",
        "-m",
        "not slow and not engines",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--basetemp={folder / str(world.rank)}",
    ]
    code = pytest.main([*words, *(str(CONTRACTS / name) for name in DIVIDED), __file__], plugins=[divide])
    (folder / f"passed-{world.rank}").write_text(str(divide.passed))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
