"""Who writes: the teacher for the student, kept answers, replay, length in stages, prompts by difficulty, a cold start.

Whatever of it has a state must go on exactly where a checkpoint left it.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retort import Method, Term, load
from retort import config as configuration
from retort.controllers.off_policy import adaptive_share
from retort.core.needs import SAMPLED
from retort.core.random_streams import uniforms
from retort.core.rollouts import Pack, Prompt, Rollout, Status, in_groups
from retort.core.sequences import TokenSequence
from retort.core.steps import Clock
from retort.divergences import forward_kl, reverse_kl
from retort.errors import RunError, UserError
from retort.estimators import pathwise
from retort.rollout.engines.base import Request, Sampling
from retort.rollout.plan import EasyToHard, Replay, RolloutPlan, plan_summary
from retort.teachers.base import ScoreRequest
from retort.teachers.view import View
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.output.text import TextOutput
from retort.train.run import Run
from retort.train.setup.prepare import Prepared, prepare
from retort.train.source.cache import FILE, RolloutCache
from retort.train.source.order import easy_to_hard
from retort.train.storage import checkpoint

pytestmark = pytest.mark.usefixtures("models_kept")


def changed(settings: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return configuration.merge(settings, sections)


def setup_of(settings: dict[str, Any], method: Method | None = None, **sections: Any) -> Prepared:
    return prepare(configuration.resolve(changed(settings, **sections), own=method), method)


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


class Crash(Silent):
    """Ends the run as a power cut would: nothing is saved after it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, steps: int, metrics: object) -> None:
        if step == self.at:
            raise SystemExit("crashed")


def assert_resumes_exactly(
    settings: dict[str, Any], tmp_path: Path, *, crash: int, own: Method | None = None, **sections: Any
) -> Path:
    """A run that crashes between two checkpoints and is resumed equals one that never stopped. Gives its folder."""
    config = configuration.resolve(changed(settings, eval={"problems": 0}, **sections), own=own)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runner.start(config, whole, method=own).go()
    with pytest.raises(SystemExit):
        runner.start(config, cut, Crash(crash), method=own).go()
    last = checkpoint.newest(cut / "checkpoints")
    assert last is not None
    assert last.name != f"step-{crash}", "the crash must lose a step"
    runner.resume(cut, method=own).go()
    assert lines(whole) == lines(cut)
    assert lines(whole, "rollouts.jsonl") == lines(cut, "rollouts.jsonl")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(cut / "model" / "model.safetensors")[name]), name
    for file in (FILE, "difficulty.jsonl"):
        assert (whole / file).exists() == (cut / file).exists()
        if (whole / file).exists():
            assert (whole / file).read_text() == (cut / file).read_text()
    return whole


# --- the teacher writes ---


@pytest.fixture
def two_dialects(model_folder: Callable[..., Path], tiny_run: dict[str, Any]) -> dict[str, Any]:
    """Student and teacher with chat templates of their own that also stop with different tokens."""
    student = model_folder(seed=1, eos="<|im_end|>", chat=True)
    teacher = model_folder(seed=2, hidden_size=24, padded_to=64)
    return changed(tiny_run, student=str(student), teacher=str(teacher), eval={"problems": 0})


def by_teacher(**more: Any) -> RolloutPlan:
    return RolloutPlan(on_policy_fraction=0.0, off_policy="teacher", **more)


def learner(plan: RolloutPlan) -> Method:
    return Method(name="mine", rollout=plan, terms=(Term("forward", pathwise(forward_kl())),))


def written(
    setup: Prepared, folder: Path, step: int = 0, cache: RolloutCache | None = None, **more: Any
) -> list[Rollout]:
    clock = Clock(step, setup.steps, seed=setup.config.seed, longest=setup.source.limit)
    return rollouts_of(setup, cache or RolloutCache(folder), clock, 0, **more)


def rollouts_of(setup: Prepared, cache: RolloutCache, clock: Clock, version: int, **more: Any) -> list[Rollout]:
    groups = replace(setup.source, cache=cache).rollouts(setup.method, clock, version, **more)
    return [rollout for group in groups for rollout in group]


def test_the_teacher_scores_its_own_answers_as_it_wrote_them(two_dialects: dict[str, Any], tmp_path: Path) -> None:
    """The whole way there and back: its rendering, its stop, the student's rendering and stop, and its own again."""
    setup = setup_of(two_dialects, learner(by_teacher(samples=3)))
    rollouts = written(setup, tmp_path)
    assert len(rollouts) == 12
    assert {rollout.source for rollout in rollouts} == {"teacher"}
    assert any(rollout.status == Status.COMPLETED for rollout in rollouts)
    student_stop, teacher_stop = setup.student.stops.primary, setup.teachers.lms["teacher"].stops.primary
    assert student_stop != teacher_stop
    heard: list[float] = []
    for rollout in rollouts:
        read = rollout.sequence.prefix.tokens_L.tolist()
        assert (
            read == setup.source.render(rollout.prompt).ids != setup.source.teacher_generator.render(rollout.prompt).ids
        )
        assert rollout.engine_logp_A is None
        ends = [token in setup.student.stops.ids for token in rollout.action_ids]
        assert ends == [False] * (len(ends) - 1) + [rollout.status == Status.COMPLETED]
        # What the engine says when it writes with these very numbers: that is what the teacher must say when it reads.
        uniform_stream = uniforms(setup.config.seed, "teacher", 0, rollout.prompt.id, rollout.member, 0, count=6)
        request = _request(setup.source.teacher_generator.render(rollout.prompt).ids, uniform_stream)
        (own,) = setup.source.teacher_generator.engine.generate([request], Sampling(6))
        assert setup.source.teacher_generator.translated(own.ids, own.status) == (rollout.action_ids, rollout.status)
        heard += own.logp_A.tolist()
    pack = Pack.of(rollouts)
    signal = setup.teachers.behind(setup.method)["teacher"].score(
        in_groups(pack.rollouts), ScoreRequest(View(), frozenset({SAMPLED}))
    )
    assert signal.rows(slice(None)).sampled_logp_N.tolist() == pytest.approx(heard, abs=1e-4)
    assert pack.steps.engine_logp_N.isnan().all()


def _request(prompt_ids: list[int], uniform_stream: torch.Tensor) -> Any:
    return Request(TokenSequence.of(prompt_ids), uniform_stream)


def test_an_answer_ends_where_the_student_would_end_it(two_dialects: dict[str, Any]) -> None:
    writer = setup_of(two_dialects, learner(by_teacher())).source.teacher_generator
    ours, theirs = writer.student_stops.primary, writer.alignment.stops[writer.student_stops.primary]
    word = next(token for token in range(10, 20) if token not in (ours, theirs))
    assert writer.translated([word, theirs], Status.COMPLETED) == ([word, ours], Status.COMPLETED)
    assert writer.translated([word, word], Status.TRUNCATED) == ([word, word], Status.TRUNCATED)
    # The student's stop is a word like any other to the teacher: it is read as the teacher's, which the student knows
    # as a word like any other.
    assert writer.translated([ours, word], Status.TRUNCATED) == ([theirs, word], Status.TRUNCATED)
    # A further stop of the teacher's ends the student's answer, too.
    assert writer.translated([word, word + 1], Status.COMPLETED) == ([word, ours], Status.COMPLETED)


def test_a_mixture_keeps_the_students_answers_as_they_were(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Who answers the rest changes nothing about what the student writes, nor about which prompts it gets."""
    data, mixed, alone = (
        written(setup_of(tiny_run, learner(plan), rollout={"prompts": 12}), tmp_path)
        for plan in (
            RolloutPlan(on_policy_fraction=0.5),
            RolloutPlan(on_policy_fraction=0.5, off_policy="teacher"),
            RolloutPlan(),
        )
    )

    def students(rollouts: list[Rollout]) -> dict[str, list[int]]:
        return {r.prompt.id: r.action_ids for r in rollouts if r.source == "student"}

    assert 0 < len(students(mixed)) < 12
    assert students(mixed) == students(data)
    assert students(mixed).items() <= students(alone).items()
    assert {r.source for r in mixed} == {"student", "teacher"}


def test_kept_answers_serve_again_and_new_ones_do_not(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    for keep in (True, False):
        setup, folder = setup_of(tiny_run, learner(by_teacher(keep=keep, samples=2)), eval={"problems": 0}), tmp_path
        folder = tmp_path / str(keep)
        folder.mkdir()
        cache, epochs = RolloutCache(folder), dict[str, set[tuple[int, ...]]]()
        for step in range(30):  # 30 prompts, 4 a step: four times through
            for rollout in written(setup, folder, step, cache):
                if rollout.member == 0:
                    epochs.setdefault(rollout.prompt.id, set()).add(tuple(rollout.action_ids))
        assert len(epochs) == 30
        assert all(len(found) == 1 for found in epochs.values()) == keep
        assert (folder / FILE).exists() == keep
        if keep:
            rows = lines(folder, FILE)
            assert len(rows) == len({(row["prompt_id"], row["member"]) for row in rows}) == 60
            again = RolloutCache(folder)
            again.go_back(setup.source.prompts, setup.source.render, 30)
            assert again.completions.keys() == cache.completions.keys()
            for key, rollout in again.completions.items():
                assert torch.equal(rollout.sequence.tokens_L, cache.completions[key].sequence.tokens_L)
                assert (rollout.text, rollout.status, rollout.reward) == (
                    cache.completions[key].text,
                    cache.completions[key].status,
                    cache.completions[key].reward,
                )
            again.go_back(setup.source.prompts, setup.source.render, 3)
            assert len(again.completions) == 24


def test_answers_kept_at_one_temperature_do_not_serve_at_another(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    cache, found = RolloutCache(tmp_path), list[list[Rollout]]()
    for temperature in (1.0, 0.3, 1.0):
        setup = setup_of(tiny_run, learner(by_teacher(keep=True, temperature=temperature)))
        found.append(written(setup, tmp_path, 0, cache))
    ids = [[rollout.action_ids for rollout in rollouts] for rollouts in found]
    assert ids[0] == ids[2] != ids[1]


def test_answers_without_an_end_are_begun_again_and_then_left_out(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    once = written(setup_of(tiny_run, learner(by_teacher(samples=8, attempts=1))), tmp_path)
    thrice = written(setup_of(tiny_run, learner(by_teacher(samples=8, attempts=3))), tmp_path)
    plain = written(setup_of(tiny_run, learner(by_teacher(samples=8))), tmp_path)
    assert len(plain) == 32
    assert 0 < len(once) < len(thrice) < 32
    assert all(rollout.status == Status.COMPLETED for rollout in thrice)
    kept = {(r.prompt.id, r.member): r.action_ids for r in thrice}
    assert {(r.prompt.id, r.member): r.action_ids for r in once}.items() <= kept.items()
    ended = [r for r in plain if r.status == Status.COMPLETED]
    assert {(r.prompt.id, r.member): r.action_ids for r in ended} == {
        (r.prompt.id, r.member): r.action_ids for r in once
    }


def test_a_teacher_that_never_ends_is_said(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    setup = setup_of(tiny_run, learner(by_teacher(attempts=1)), rollout={"max_new_tokens": 1})
    setup.teachers.lms["teacher"].stops = replace(setup.teachers.lms["teacher"].stops, ids=frozenset({63}), primary=63)
    with pytest.raises(RunError, match="ended none of its completions within 1 tokens.*max_new_tokens"):
        written(setup, tmp_path)


@pytest.mark.parametrize("prefix", ["student", "teacher", "dataset"])
@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["forward", "reverse"])
def test_all_cells_of_decoupled_kl_learn(tiny_run: dict[str, Any], tmp_path: Path, prefix: str, weight: float) -> None:
    """End to end: what the cell minimises falls on the prefixes it is minimised on."""
    method = {"name": "decoupled_kl", "prefix": prefix, "reverse_weight": weight, "top_p": 1.0}
    sections = {"method": method, "steps": 20, "rollout": {"prompts": 8}, "checkpoint": {"every": 0}}
    run = runner.start(
        configuration.resolve(changed(tiny_run, eval={"problems": 0}, **sections)), tmp_path / "run"
    ).go()
    assert {row["source"] for row in lines(run.folder, "rollouts.jsonl")} == {prefix}
    loss = [row["loss"] for row in lines(run.folder)]
    assert sum(loss[-5:]) < 0.8 * sum(loss[:5])


def test_kept_teacher_answers_resume_exactly(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    method = {"name": "decoupled_kl", "prefix": "teacher", "reverse_weight": 1.0}
    folder = assert_resumes_exactly(tiny_run, tmp_path, crash=9, method=method, steps=12)
    assert len(lines(folder, FILE)) == 30


def test_nonsense_in_a_plan_is_refused() -> None:
    for settings, message in (
        ({"attempts": 0}, "attempts must be at least 1"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction must lie"),
    ):
        with pytest.raises(UserError, match=message):
            RolloutPlan(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="capacity must be at least 1"):
        Replay(capacity=0)
    with pytest.raises(UserError, match="samples must be at least 1"):
        EasyToHard(samples=0)
    with pytest.raises(UserError, match="must not be negative"):
        EasyToHard(noise=-1.0)
    for plan in (by_teacher(), RolloutPlan(replay=Replay())):
        with pytest.raises(UserError, match="term 'reverse' is a policy gradient.*use pathwise"):
            Method(rollout=plan, terms=load("opd").terms)
    twice = (adaptive_share(), adaptive_share())
    with pytest.raises(UserError, match="two controllers of one name"):
        replace(learner(RolloutPlan()), controllers=twice)
    with pytest.raises(UserError, match="controller 'off_policy' reads view 'elsewhere'"):
        replace(learner(RolloutPlan()), controllers=(replace(twice[0], against="elsewhere"),))
    with pytest.raises(UserError, match="a setting reads 'nobody.number'"):
        learner(RolloutPlan(horizon=adaptive_share(name="nobody").read("number")))


# --- the student's share, and its old answers ---


def skew_like(*, every: int = 2, capacity: int = 6, margin: float = -100.0, **more: Any) -> Method:
    """As DistiLLM's adaptive off-policy mode is wired; a margin this low makes every validation raise the share."""
    adaptive = adaptive_share(every=every, prompts=4, margin=margin, **more)
    return Method(
        name="skew_like",
        rollout=RolloutPlan(on_policy_fraction=adaptive.read("share"), replay=Replay(capacity=capacity)),
        terms=(Term("reverse", pathwise(reverse_kl())),),
        controllers=(adaptive,),
    )


def test_the_share_rises_with_every_bad_validation_and_answers_are_replayed(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    method = skew_like(rise=0.25)
    folder = assert_resumes_exactly(tiny_run, tmp_path, crash=11, own=method, steps=14)
    rows = lines(folder)
    shares = [row["control/off_policy.share"] for row in rows]
    assert shares[0] == 0.0  # the validation before the first step only sets the reference
    assert shares == [min(1.0, 0.25 * (place // 2)) for place in range(14)]
    assert "probe/off_policy.loss" in rows[1]
    assert any(row.get("replayed_fraction", 0) > 0 for row in rows)
    written = next((folder / "checkpoints").glob("step-14/parts.safetensors"))
    parts = load_file(written)
    assert len(parts["replay/sizes"]) == 6
    assert {"control/off_policy/share", "control/off_policy/reference"} <= parts.keys()
    written.write_bytes(written.read_bytes()[:-1])
    with pytest.raises(UserError, match="parts.safetensors is truncated or was changed"):
        runner.resume(folder, method=method, steps=16)


def test_a_replayed_answer_is_one_that_was_written_before(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    plan = RolloutPlan(samples=2, replay=Replay(capacity=3, fresh=0.5))
    setup, cache, before = setup_of(tiny_run, learner(plan)), RolloutCache(tmp_path), dict[tuple[str, int], list[int]]()
    replayed = 0
    for step in range(12):
        rollouts = rollouts_of(setup, cache, Clock(step, 12), version=step)
        old = [rollout for rollout in rollouts if rollout.policy_version < step]
        assert len(old) % 2 == 0  # whole visits
        for rollout in old:
            assert before[rollout.prompt.id, rollout.member] == rollout.action_ids
            assert rollout.engine_logp_A is not None
        replayed += len(old)
        before |= {(r.prompt.id, r.member): r.action_ids for r in rollouts}
        assert len(cache.visits) <= 3
    assert replayed > 0
    again = RolloutCache(tmp_path)
    again.restore(setup.source.prompts, setup.source.render, cache.tensors(setup.source.prompts))
    for one, two in zip(cache.visits, again.visits, strict=True):
        for ours, theirs in zip(one, two, strict=True):
            assert torch.equal(ours.sequence.tokens_L, theirs.sequence.tokens_L)
            assert torch.equal(ours.engine_logp_A, theirs.engine_logp_A)  # type: ignore[arg-type]
            assert torch.equal(ours.sequence.action_mask_L, theirs.sequence.action_mask_L)
            left, right = (replace(r, sequences=ours.sequences, engine_logp_A=None) for r in (ours, theirs))
            assert left == right


def test_replay_waits_until_its_shelf_is_full(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    setup = setup_of(tiny_run, learner(RolloutPlan(replay=Replay(capacity=9, fresh=0.0))))
    cache, versions = RolloutCache(tmp_path), list[set[int]]()
    for step in range(4):
        versions.append({r.policy_version for r in rollouts_of(setup, cache, Clock(step, 4), version=step)})
    assert versions[:3] == [{0}, {1}, {2}]
    assert 3 not in versions[3]


# --- longer answers in stages ---


def staged(**settings: Any) -> dict[str, Any]:
    chosen = {"name": "decoupled_kl", "reverse_weight": 1.0, "lengths": [2, 4, 6], "probe_every": 2, "top_p": 1.0}
    return {**chosen, **settings}


def horizons(folder: Path) -> list[float]:
    return [row["control/length.horizon"] for row in lines(folder)]


def test_lengths_grow_in_stages_and_resume_exactly(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    method = staged(min_entropy=float("-inf"))
    folder = assert_resumes_exactly(tiny_run, tmp_path, crash=3, method=method, steps=6)
    assert horizons(folder) == [2, 2, 4, 4, 6, 6]
    longest = [max(len(row["ids"]) for row in lines(folder, "rollouts.jsonl") if row["step"] <= end) for end in (2, 4)]
    assert longest == [2, 4]
    assert all("probe/length.entropy" in row for row in lines(folder)[1::2])


def test_lengths_are_held_or_the_run_ends_where_entropy_is_too_low(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    held = assert_resumes_exactly(
        tiny_run, tmp_path / "held", crash=3, method=staged(min_entropy=float("inf")), steps=6
    )
    assert horizons(held) == [2] * 6
    config = configuration.resolve(
        changed(tiny_run, eval={"problems": 0}, steps=6, method=staged(min_entropy=1e9, on_failure="terminate"))
    )
    run = runner.start(config, tmp_path / "terminated").go()
    assert run.step == 2
    assert (tmp_path / "terminated" / "model" / "model.safetensors").exists()
    assert runner.resume(tmp_path / "terminated").go().step == 2


def test_the_probe_is_the_token_weighted_entropy_of_prompts_never_trained_on(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    setup = setup_of(tiny_run, load("decoupled_kl", lengths=(2, 4), probe_every=1), eval={"problems": 0})
    assert len(setup.source.probe) == 6
    assert not {p.id for p in setup.source.probe} & {p.id for p in setup.source.prompts}
    run = Run(TextOutput(setup), tmp_path)
    clock = Clock(1, 4, seed=setup.config.seed, longest=setup.source.limit)
    found = run.control.probe(setup.method, clock, partial(run.probes.measure, setup.method))["probe/length.entropy"]
    assert run.control.controller_outputs(setup.method)["length.horizon"] == 4
    # By hand: write with the same luck, and average over tokens.
    entropies: list[float] = []
    for prompt in setup.source.probe:
        request = _request(setup.source.render(prompt).ids, uniforms(setup.config.seed, "probe", prompt.id, count=2))
        (own,) = setup.source.engine.generate([request], Sampling(2, 1.0, 0.95))
        sequence = request.context.then(own.ids, decided=True)
        with torch.no_grad():
            logits = setup.student.head().logits(setup.student.hidden([sequence]))[:, : setup.learner.vocab]
        entropies += torch.distributions.Categorical(logits=logits.double()).entropy().tolist()
    assert found == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_a_probe_needs_prompts_and_responses(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    rows = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(1, 10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    with pytest.raises(UserError, match="needs training prompts to probe on.*5 or more"):
        setup_of(tiny_run, load("decoupled_kl", lengths=(2, 4)), data=str(data), eval={"problems": 0})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    method = replace(skew_like(), rollout=RolloutPlan())
    with pytest.raises(UserError, match="probes on responses of the data.*no `response`"):
        setup_of(tiny_run, method, data=str(data), eval={"problems": 0})


# --- a policy that learns as the run goes ---


@pytest.mark.parametrize("mode", ["bandit", "bernoulli", "paper", "greedy_min"])
def test_arkd_resumes_exactly(tiny_run: dict[str, Any], tmp_path: Path, mode: str) -> None:
    method = {"name": "arkd", "mode": mode, "policy_learning_rate": 0.1}
    folder = assert_resumes_exactly(tiny_run, tmp_path, crash=5, method=method, steps=6)
    rows = lines(folder)
    for row in rows:
        forward, reverse = row["control/balance.forward"], row["control/balance.reverse"]
        assert forward + reverse == pytest.approx(1.0)
        mixed = forward * row["loss/forward"] + reverse * row["loss/reverse"]
        assert row["loss"] == pytest.approx(mixed, rel=1e-5)
    assert len({row["control/balance.forward"] for row in rows}) > 1 or mode == "greedy_min"


def test_a_method_with_other_controllers_is_not_resumed_with(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    config = configuration.resolve(changed(tiny_run, eval={"problems": 0}, steps=2), own=skew_like())
    runner.start(config, tmp_path / "run", method=skew_like()).go()
    with pytest.raises(UserError, match="a method with other controllers"):
        runner.resume(tmp_path / "run", method=skew_like(name="another"), steps=3)


# --- prompts by difficulty ---


def prompts(count: int) -> list[Prompt]:
    from retort.core.rollouts import Message

    return [Prompt(id=str(place), messages=(Message("user", str(place)),)) for place in range(count)]


def test_sorted_order_visits_every_prompt_once_easiest_first() -> None:
    hard = {str(place): (place * 7 % 10) / 10 for place in range(20)}
    for noise in (0.0, 0.02, 5.0):
        order = EasyToHard(noise=noise)
        met = [
            visit.prompt.id
            for step in range(5)
            for visit in easy_to_hard(prompts(20), hard, order, seed=0, clock=Clock(step, 5), count=4)
        ]
        assert sorted(met, key=int) == [str(place) for place in range(20)]
        values = [hard[name] for name in met]
        assert (values == sorted(values)) == (noise < 1)
    # The second time through is another order of what is equally hard, and again every prompt.
    again = [
        visit.prompt.id
        for step in range(5, 10)
        for visit in easy_to_hard(prompts(20), hard, EasyToHard(noise=0.0), seed=0, clock=Clock(step, 10), count=4)
    ]
    assert sorted(again, key=int) == [str(place) for place in range(20)]


def test_the_gate_never_shrinks_and_draws_only_what_is_easy_enough() -> None:
    order = EasyToHard(kind="gated", start=0.3, power=1.0)
    gates = [order.gate(step, 10) for step in range(11)]
    assert gates == sorted(gates)
    assert gates[0] == 0.3
    assert gates[-1] == pytest.approx(0.6)
    assert EasyToHard(kind="gated", start=0.5).gate(10, 10) == 1.0
    hard = {str(place): place / 20 for place in range(20)}
    for step in range(10):
        met = easy_to_hard(prompts(20), hard, order, seed=0, clock=Clock(step, 10), count=4)
        assert len({visit.prompt.id for visit in met}) == 4
        assert all(hard[visit.prompt.id] <= gates[step] for visit in met)
    few = easy_to_hard(prompts(20), hard, EasyToHard("gated", start=0.0), seed=0, clock=Clock(0, 9), count=4)
    assert sorted(visit.prompt.id for visit in few) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("kind", ["sorted", "gated"])
def test_difficulty_is_measured_before_training_and_kept(tiny_run: dict[str, Any], tmp_path: Path, kind: Any) -> None:
    method = learner(RolloutPlan(order=EasyToHard(kind=kind, samples=4)))
    setup = setup_of(tiny_run, method, eval={"problems": 0})

    def untrained(prompt: Prompt) -> list[str]:
        before = setup.source.render(prompt).ids
        requests = [_request(before, uniforms(0, "difficulty", prompt.id, member, count=6)) for member in range(4)]
        written = setup.source.engine.generate(requests, Sampling(6))
        return [setup.student.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in written]

    # A random student is never right: so for every second prompt what it says is called right.
    wanted, data = {}, tmp_path / "prompts.jsonl"
    rows = []
    for place, prompt in enumerate(setup.source.prompts):
        texts = untrained(prompt)
        answer = texts[0] if place % 2 else "39 39"
        wanted[prompt.id] = sum(text.split() == answer.split() for text in texts) / 4
        rows.append({"prompt": prompt.text, "answer": answer})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = assert_resumes_exactly(tiny_run, tmp_path, crash=3, own=method, steps=4, data=str(data))
    rates = {row["prompt_id"]: row["pass_rate"] for row in lines(folder, "difficulty.jsonl")}
    assert rates == wanted
    assert sum(rate > 0 for rate in rates.values()) == 15
    if kind == "sorted":  # 16 of 30 prompts are met, 15 of them could be answered
        met = {row["prompt_id"] for row in lines(folder, "rollouts.jsonl")}
        assert sum(rates[name] == 0 for name in met) <= 1
    (folder / "difficulty.jsonl").unlink()
    with pytest.raises(UserError, match="difficulty.jsonl: missing.*only be made before the first step"):
        runner.resume(folder, method=method, steps=6).go()


def test_a_difficulty_pass_goes_on_where_it_was_interrupted(
    tiny_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retort.train.source.difficulty._BLOCK", 8)
    method = learner(RolloutPlan(order=EasyToHard(samples=2)))
    config = configuration.resolve(changed(tiny_run, eval={"problems": 0}, steps=2), own=method)

    class Interrupter(Silent):
        def phase(self, text: str, done: int, total: int) -> None:
            if done == 16:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunError, match="interrupted at step 0 of 2; everything is saved"):
        runner.start(config, tmp_path / "cut", Interrupter(), method=method).go()
    assert len(lines(tmp_path / "cut", "difficulty.jsonl")) == 16
    with pytest.raises(UserError, match="holds a run already"):
        runner.start(config, tmp_path / "cut", method=method)
    # A line that was cut in writing is written again.
    with (tmp_path / "cut" / "difficulty.jsonl").open("a") as file:
        file.write('{"step": 0, "prompt_')
    runner.resume(tmp_path / "cut", method=method).go()
    runner.start(config, tmp_path / "whole", method=method).go()
    assert lines(tmp_path / "cut", "difficulty.jsonl") == lines(tmp_path / "whole", "difficulty.jsonl")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_ordering_by_difficulty_needs_answers(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a} + 1 ="}) + "\n" for a in range(1, 10)))
    settings = {key: value for key, value in tiny_run.items() if key != "task"}
    with pytest.raises(UserError, match="orders prompts by the student's pass rate.*add the column"):
        setup_of(settings, learner(RolloutPlan(order=EasyToHard())), data=str(data), eval={"problems": 0})


# --- a cold start ---


@pytest.mark.parametrize("answers", ["teacher", "dataset"])
@pytest.mark.parametrize("crash", [3, 5])
def test_a_cold_start_comes_first_and_resumes_exactly(
    tiny_run: dict[str, Any], tmp_path: Path, answers: str, crash: int
) -> None:
    cold = {"steps": 3, "answers": answers, "learning_rate": 1e-3, "attempts": None}
    optimizer = {"schedule": "linear", "updates": 1}
    folder = assert_resumes_exactly(
        tiny_run, tmp_path, crash=crash, method="opd", steps=6, cold_start=cold, optimizer=optimizer
    )
    rows = lines(folder)
    assert ["loss/sft" in row for row in rows] == [True] * 3 + [False] * 3
    assert ["loss/reverse" in row for row in rows] == [False] * 3 + [True] * 3
    sources = {row["step"]: row["source"] for row in lines(folder, "rollouts.jsonl")}
    assert list(sources.values()) == [answers] * 3 + ["student"] * 3
    # A training of its own, with a rate of its own; then one from the beginning.
    rates = [row["lr"] for row in rows]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3, 1e-2, 2e-2 / 3, 1e-2 / 3])


def test_a_cold_start_teaches_and_then_gives_way(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """What follows is what would follow a model that was fine-tuned that way: optimizer and dials begin anew."""
    cold = {"steps": 20, "loss": "forward_kl", "attempts": None}
    sections = {"cold_start": cold, "steps": 21, "method": "opd", "checkpoint": {"every": 20}}
    config = configuration.resolve(changed(tiny_run, eval={"problems": 0}, **sections))
    run = runner.start(config, tmp_path / "run").go()
    losses = [row["loss/forward_kl"] for row in lines(run.folder)[:20]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    moments = load_file(run.folder / "checkpoints" / "step-21" / "optimizer.safetensors")
    assert {float(moments[name]) for name in moments if name.endswith(".step")} == {2.0}


def test_a_cold_start_must_leave_steps(tiny_run: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a cold start of 4 steps leaves none of the run's 4"):
        setup_of(tiny_run, cold_start={"steps": 4})


def test_a_cold_start_on_the_data_needs_its_responses(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a} + 1 =", "answer": "1"}) + "\n" for a in range(1, 10)))
    with pytest.raises(UserError, match="no `response`; add the column, or set cold_start.answers=teacher"):
        setup_of(tiny_run, data=str(data), cold_start={"steps": 2, "answers": "dataset"})


# --- what the user reads ---


def test_the_summary_says_who_writes() -> None:
    adaptive, alone = adaptive_share(), "4 prompts x 1 at temperature 1"
    for plan, said in (
        (RolloutPlan(), alone),
        (
            RolloutPlan(on_policy_fraction=0.5),
            "4 prompts x 1 at temperature 1, 50% of prompts (else the data's response)",
        ),
        (by_teacher(samples=2), "4 prompts x 2 at temperature 1, completions by the teacher"),
        (
            RolloutPlan(on_policy_fraction=adaptive.read("share"), replay=Replay()),
            "4 prompts x 1 at temperature 1, a share given by off_policy.share (else by the data), replayed from 1000 "
            "visits",
        ),
        (RolloutPlan(order=EasyToHard()), "4 prompts x 1 at temperature 1, easy to hard"),
    ):
        assert plan_summary(plan, 4) == said
