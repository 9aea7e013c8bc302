"""Completions that do not end within a budget: what is generated and learnt, and what a resumed run makes of it."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from following import SETTINGS, following, killed_after
from forked import started
from scripted import ScriptedEngine
from support import make_tokenizer
from train.source.test_ahead import Crash, assert_same, lines, start

from retort import config as configuration
from retort.core.random_streams import UniformStream
from retort.core.rollouts import Prompt, Rollout, Status
from retort.core.sequences import TokenSequence
from retort.errors import RunError, UserError
from retort.models.load import load_model
from retort.rollout.engines.base import Engine, Request, Sampling
from retort.rollout.engines.hf import HFEngine
from retort.rollout.episodes import Task, run_episodes
from retort.train import runner
from retort.train.source.ages import token_ages
from retort.train.source.order import visits, visits_from
from retort.train.source.partial import Dropped, Generation, Partial, Resumed, Waited
from retort.train.storage import checkpoint

pytestmark = pytest.mark.usefixtures("models_kept")
#: Tokens of which the student draws one in about ten: completions end early, late, or not at all.
STOPS = ["<eos>", *map(str, range(0, 40, 8))]
LONGEST, BUDGET = 18, 4
PROMPTS = [Prompt(f"row {n}", ()) for n in range(6)]


@pytest.fixture(autouse=True)
def with_a_copy() -> Iterator[None]:
    """Every engine is a copy in this process, where the settings name another one."""
    with following():
        yield


def partial(settings: dict[str, Any], kind: str, **sections: Any) -> dict[str, Any]:
    own = {
        "rollout": {"partial": kind, "segment_tokens": BUDGET, "max_new_tokens": LONGEST, "stop": STOPS},
        "eval": {"problems": 0},
        "method": {"name": "opd", "samples": 2},
        "record": {"rollouts": 100},
        "steps": 6,
    }
    return configuration.merge(configuration.merge(settings, own), sections)


def named(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["prompt_id"], row["member"]) for row in rows]


# Without a run.


@pytest.fixture(scope="module")
def engine(model_folder: Callable[..., Path]) -> HFEngine:
    cpu = torch.device("cpu")
    lm = load_model(str(model_folder(seed=5)), role="student", precision="fp32", device=cpu, stop=STOPS)
    return HFEngine(lm, vocab=58, max_parallel=3)


def generated(engine: Engine, by: Partial, tasks: Sequence[Task], longest: int = LONGEST) -> list[Rollout]:
    def play(own: Sequence[Task], sampling: Sampling) -> list[Rollout]:
        return run_episodes(engine, own, sampling)

    sampling = Sampling(longest, 1.1)
    given = Generation(
        engine, 0, sampling, lambda own, work: work(own), lambda own: play(own, sampling), play, lambda own: own
    )
    return by.generate(tasks, given)


def tasks_of(prompts: Sequence[Prompt], members: int = 3) -> list[Task]:
    contexts = [TokenSequence.of([5 + n % 3, 9, 12, 7][: 1 + n % 4]) for n in range(len(PROMPTS))]
    return [
        Task(own, contexts[PROMPTS.index(own)], member, UniformStream(0, "rollouts", 2, own.id, member), visit=2)
        for own in prompts
        for member in range(members)
    ]


@pytest.mark.parametrize("budget", [1, 4, 7])
def test_a_resumed_completion_is_the_one_that_was_not_interrupted(engine: HFEngine, budget: int) -> None:
    whole = {(own.prompt.id, own.member): own for own in generated(engine, Waited(), tasks_of(PROMPTS))}
    assert {own.status for own in whole.values()} == {Status.COMPLETED, Status.TRUNCATED}
    by, found = Resumed(budget), list[Rollout]()
    for batch in (PROMPTS[:3], PROMPTS[3:5], PROMPTS[5:], *[[]] * LONGEST):
        found += generated(engine, by, tasks_of(batch))
    assert len(found) == len(whole)
    for own in found:
        same = whole.pop((own.prompt.id, own.member))
        assert (own.action_ids, own.text, own.status, own.visit) == (same.action_ids, same.text, same.status, 2)
        assert own.sequence.prefix_key == same.sequence.prefix_key
        torch.testing.assert_close(own.engine_logp_A, same.engine_logp_A, rtol=1e-4, atol=1e-5)
        assert [tokens for _, tokens in own.segments] == [
            min(budget, own.steps - begin) for begin in range(0, own.steps, budget)
        ]
    assert generated(engine, by, []) == []


def scripted(lengths: Sequence[int]) -> ScriptedEngine:
    """Ends the completion of each prompt of `scripted_tasks` after so many tokens."""
    logits_V = torch.zeros(len(lengths) + 10)

    def says(request: Request) -> list[int]:
        prompt, *had = request.context.ids
        return [*[3] * (lengths[prompt - 10] - len(had) - 1), 2]

    return ScriptedEngine(make_tokenizer(), 2, logits_V, says=says)


def scripted_tasks(*prompts: int, members: int = 1) -> list[Task]:
    return [
        Task(PROMPTS[n], TokenSequence.of([10 + n]), member, UniformStream(0, "rollouts", PROMPTS[n].id, member))
        for n in prompts
        for member in range(members)
    ]


def test_each_segment_has_the_version_that_generated_it() -> None:
    engine, by, found = scripted([99, 2, 4, 1, 3]), Resumed(BUDGET), dict[str, Rollout]()
    for batch, version in enumerate((3, 4, 8, 9, 11)):
        engine.update(version)
        new = scripted_tasks(*([0, 1] if batch == 0 else [batch + 1] if batch < 4 else []))
        found |= {own.prompt.id: own for own in generated(engine, by, new)}
    assert found["row 0"].segments == ((3, 4), (4, 4), (8, 4), (9, 4), (11, 2))
    assert (found["row 0"].policy_version, found["row 0"].status) == (3, Status.TRUNCATED)
    assert [found[f"row {n}"].segments for n in (1, 2, 3, 4)] == [((3, 2),), ((4, 4),), ((8, 1),), ((9, 3),)]
    assert token_ages([tuple(found.values())], 11) == {
        "staleness/mean": (6 * 8 + 8 * 7 + 5 * 3 + 7 * 2) / 28,
        "staleness/max": 8,
        **{f"staleness/tokens/{age}": count for age, count in ((0, 2), (2, 7), (3, 5), (7, 8), (8, 6))},
    }


def test_a_batch_in_which_no_group_ends_goes_on_until_one_does() -> None:
    engine, by = scripted([14, 9]), Resumed(BUDGET)
    found = generated(engine, by, scripted_tasks(0, 1, members=2))
    assert [(own.prompt.id, own.segments) for own in found] == [("row 1", ((0, 4), (0, 4), (0, 1)))] * 2
    assert by.unended.metrics() == {"partial/open": 2, "partial/waiting": 0}
    assert len(by.visits(PROMPTS, seed=0, step=1, count=4)) == 3
    assert [own.segments[-1] for own in generated(engine, by, [])] == [(0, 2)] * 2


def test_a_failed_batch_leaves_what_was_open_as_it_was(engine: HFEngine) -> None:
    by = Resumed(BUDGET)
    begun = by.visits(PROMPTS, seed=0, step=0, count=3)
    generated(engine, by, tasks_of([own.prompt for own in begun]))
    put_back, before = by.mark(), by.tensors(PROMPTS)
    by.visits(PROMPTS, seed=0, step=1, count=3)
    generated(engine, by, tasks_of(PROMPTS[3:]))
    changed = by.tensors(PROMPTS)
    put_back()
    after = by.tensors(PROMPTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(own, after[name]) for name, own in before.items())
    assert any(not torch.equal(own, changed[name]) for name, own in before.items())


def test_what_has_not_ended_is_dropped_before_it_is_graded(engine: HFEngine) -> None:
    whole = generated(engine, Waited(), tasks_of(PROMPTS))
    by = Dropped(tokens=BUDGET)
    kept = generated(engine, by, tasks_of(PROMPTS))
    expected = [own for own in whole if own.steps <= BUDGET and own.status == Status.COMPLETED]
    assert [own.action_ids for own in kept] == [own.action_ids for own in expected]
    assert 0 < len(kept) < len(whole)
    rows = by.unended.rows(7)
    assert {(row["prompt_id"], row["member"]) for row in rows} == {
        (own.prompt.id, own.member) for own in whole if own not in expected
    }
    assert {(row["step"], row["tokens"], row["visit"]) for row in rows} == {(7, BUDGET, 2)}
    # Where the longest completion is no longer than the budget, one that is cut off there is learnt from as ever.
    assert len(generated(engine, by, tasks_of(PROMPTS), longest=BUDGET)) == len(whole)
    assert by.unended.metrics() == {"partial/dropped": 0}


def test_prompts_go_on_where_the_last_batch_left_off() -> None:
    whole = [own for step in range(5) for own in visits(PROMPTS, seed=3, step=step, count=4)]
    for start_, count in ((0, 3), (3, 9), (12, 1), (13, 0), (13, 7)):
        assert visits_from(PROMPTS, seed=3, start=start_, count=count) == whole[start_ : start_ + count]


# Runs.


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("kind", ["drop", "resume"])
def test_kill_9_and_resume_learns_what_an_undisturbed_run_does(
    tiny_run: dict[str, Any], tmp_path: Path, kind: str, staleness: int
) -> None:
    settings = partial(tiny_run, kind, rollout={**SETTINGS, "staleness": staleness})
    start(settings, tmp_path / "whole").go()
    process = started(killed_after, settings, tmp_path / "killed", 3)
    process.join(600)
    assert process.exitcode == -signal.SIGKILL
    assert len(lines(tmp_path / "killed")) == 3
    runner.resume(tmp_path / "killed").go()
    assert_same(tmp_path / "whole", tmp_path / "killed")
    if kind == "drop":
        assert lines(tmp_path / "whole", "dropped.jsonl") == lines(tmp_path / "killed", "dropped.jsonl")
    accounted_for(tmp_path / "killed", kind)


def accounted_for(folder: Path, kind: str) -> None:
    """Every completion that has begun is learnt from once, or dropped, or open at the end."""
    metrics, learnt = lines(folder), lines(folder, "rollouts.jsonl")
    prompts = runner.load(folder).prepared.source.prompts
    if kind == "drop":
        begun = [own for step in range(6) for own in visits(prompts, seed=0, step=step, count=4)]
        dropped = lines(folder, "dropped.jsonl")
        found = named(learnt) + named(dropped)
        assert [row["partial/dropped"] for row in metrics] == [
            sum(own["step"] == row["step"] for own in dropped) for row in metrics
        ]
    else:
        held = checkpoint.load(checkpoint.newest(folder / "checkpoints") or folder).parts
        by = Resumed(BUDGET)
        by.restore(held, prompts)
        begun = visits_from(prompts, seed=0, start=0, count=int(held["partial/position"]))
        open_ = [own for group in by._open for own in group]  # pyright: ignore[reportPrivateUsage]
        assert metrics[-1]["partial/open"] + metrics[-1]["partial/waiting"] == len(open_) > 0
        found = named(learnt) + [(own.prompt.id, own.member) for own in open_]
    assert Counter(found) == Counter((own.prompt.id, member) for own in begun for member in range(2))


def test_the_loop_in_this_process_resumes_and_what_is_older_is_seen(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = partial(tiny_run, "resume")
    run = start(settings, tmp_path / "whole").go()
    with pytest.raises(SystemExit):
        start(settings, tmp_path / "cut", Crash(3)).go()
    runner.resume(tmp_path / "cut").go()
    assert_same(tmp_path / "whole", tmp_path / "cut")
    accounted_for(tmp_path / "cut", "resume")
    by_age = Counter[str]()
    for row in run.metrics:
        own = {name: value for name, value in row.items() if name.startswith("staleness/tokens/")}
        assert sum(own.values()) == row["tokens"]
        assert "replayed_fraction" not in row
        by_age.update(own)
    assert by_age["staleness/tokens/0"] > 0 < by_age["staleness/tokens/2"]
    assert max(row["partial/segments"] for row in run.metrics) > 1
    for row in lines(tmp_path / "whole", "rollouts.jsonl"):
        versions = [version for version, _ in row["segments"]]
        assert sum(tokens for _, tokens in row["segments"]) == len(row["ids"])
        assert versions == sorted(versions)
        assert row["policy_version"] == versions[0]
        assert versions[-1] <= 2 * (row["step"] - 1)
    # Each token is weighed by the log-prob of the weights that generated it.
    assert all("importance" in row for row in run.metrics)


def test_a_rollout_is_learnt_with_the_log_probs_of_its_segments(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Without an update between them, engine and trainer agree at every token, whichever batch generated it."""
    still = {"optimizer": {"learning_rate": 1e-12}}
    run = start(partial(tiny_run, "resume", **still), tmp_path / "run").go()
    assert max(row["noise_floor"] for row in run.metrics) < 1e-5
    assert max(row["staleness/max"] for row in run.metrics) > 0


def test_a_budget_that_no_completion_reaches_changes_nothing(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Completions of one token each: they end, or are cut off at the longest."""
    at_once = {"optimizer": {"updates": 1}, "rollout": {"segment_tokens": LONGEST - 1, "stop": None}}
    all_stop = configuration.merge(at_once, {"rollout": {"stop": ["<eos>", *map(str, range(40)), *"+-*=,:()"]}})
    for kind in ("wait", "drop"):
        own = {"rollout": {"segment_tokens": None}} if kind == "wait" else {}
        start(configuration.merge(partial(tiny_run, kind, **all_stop), own), tmp_path / kind).go()
    rows = [{**row} for row in lines(tmp_path / "drop")]
    assert {row.pop("partial/dropped") for row in rows} == {0}
    assert rows == lines(tmp_path / "wait")


def test_a_batch_of_which_all_is_dropped_stops_the_run_in_one_line(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = partial(tiny_run, "drop", rollout={"segment_tokens": 1, "stop": ["<eos>"]})
    with pytest.raises(RunError, match=r"step 1: none of the 8 completions ended within rollout.segment_tokens=1 tok"):
        start(settings, tmp_path / "run").go()


def test_a_cold_start_comes_first_and_its_prompts_are_not_seen_again(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = partial(tiny_run, "resume", cold_start={"steps": 2, "answers": "dataset"})
    start(settings, tmp_path / "whole").go()
    with pytest.raises(SystemExit):
        start(settings, tmp_path / "cut", Crash(3)).go()
    runner.resume(tmp_path / "cut").go()
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = lines(tmp_path / "cut", "rollouts.jsonl")
    cold = {row["prompt_id"] for row in rows if row["step"] <= 2}
    assert len(cold) == 8
    assert not cold & {row["prompt_id"] for row in rows if row["step"] > 2}


def test_the_data_give_some_completions_and_are_learnt_at_once(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    settings = partial(tiny_run, "resume", method={"name": "gkd"})
    settings["method"].pop("samples")
    start(settings, tmp_path / "whole").go()
    with pytest.raises(SystemExit):
        start(settings, tmp_path / "cut", Crash(3)).go()
    runner.resume(tmp_path / "cut").go()
    assert_same(tmp_path / "whole", tmp_path / "cut")
    rows = lines(tmp_path / "cut", "rollouts.jsonl")
    assert {row["source"] for row in rows} == {"student", "dataset"}
    assert len(named(rows)) == len(set(named(rows)))


def test_another_budget_is_refused_when_a_run_is_resumed(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(SystemExit):
        start(partial(tiny_run, "resume"), folder, Crash(3)).go()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"segment_tokens": 4', '"segment_tokens": 5'))
    with pytest.raises(UserError, match=r"rollout.segment_tokens = 5 \(it was 4\); put them back in"):
        runner.resume(folder)
