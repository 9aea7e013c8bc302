"""The student as its own teacher: whose weights it has at every moment of a run, and that a resumed run agrees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retort import api, registry
from retort import config as configuration
from retort.align.pair import SameIds
from retort.controllers import Controller
from retort.core.needs import DENSE, SAMPLED, Need
from retort.core.rollouts import Message, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.divergences import forward_kl
from retort.errors import SignalError, UserError
from retort.estimators import pathwise
from retort.method import Method, Term
from retort.preflight.doctor import examine_setup
from retort.quantities import student_entropy
from retort.rollout.plan import RolloutPlan
from retort.teachers.base import ScoreRequest
from retort.teachers.itself import OwnWeights, SelfTeacher, sides_of
from retort.teachers.local import LocalTeacher
from retort.teachers.moving import Weights, ema, frozen, hard_copy, live, trust_region
from retort.teachers.view import View
from retort.teachers.view_input import ViewInput
from retort.train import runner
from retort.train.events.observe import Silent
from retort.train.models.models import load
from retort.train.output import export
from retort.train.output.summary import summary
from retort.train.setup.memory import forecast
from retort.train.setup.pair import own_weights, without_idle_teacher
from retort.train.setup.prepare import prepare

pytestmark = pytest.mark.usefixtures("models_kept")


def hinted(scene: ViewInput) -> Prompt:
    """What the teacher sees: more than the student."""
    prompt = scene.prompt
    text = f"so the answer is {prompt.answer} {prompt.messages[-1].content}"
    return replace(prompt, messages=(Message("user", text),))


def self_view(weights: Weights) -> View:
    return View(model="student", weights=weights, render=hinted)


def self_taught(*weights: Weights, name: str = "self_taught") -> Method:
    """A method of one term per self-teacher."""
    views = {f"self{place}": self_view(each) for place, each in enumerate(weights)}
    terms = tuple(
        Term(f"forward{place}", pathwise(forward_kl()), against=f"self{place}") for place in range(len(views))
    )
    return Method(rollout=RolloutPlan(samples=2), terms=terms, views=views, name=name)


@pytest.fixture
def alone(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """A tiny run of a student without a teacher."""
    return {**{name: value for name, value in tiny_run.items() if name != "teacher"}, "steps": 4}


def settings(given: dict[str, Any], method: Method, **more: Any) -> configuration.Config:
    return api.assemble(given, more, own=method)


def started(given: dict[str, Any], folder: Path, *weights: Weights, **more: Any) -> runner.Run:
    method = self_taught(*weights)
    return runner.start(settings(given, method, **more), folder, method=method)


def state(lm: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def weights_of(own: OwnWeights, weights: Weights) -> dict[str, Tensor]:
    with own.in_place(weights):
        return state(own.lm)


@pytest.fixture
def lm(alone: dict[str, Any]) -> Any:
    return load(settings(alone, self_taught(frozen())), alone["student"], "student")


@pytest.fixture
def pack(lm: Any) -> Pack:
    prompt = Prompt("a", (Message("user", "1 + 2 ="),), answer="3", plain=True)
    ids = lm.tokenizer("1 + 2 =")["input_ids"]
    rollouts = [
        Rollout(prompt, TokenSequence.of(ids).then(answer, decided=True)) for answer in ([8, 9, 2], [10, 11, 12, 2])
    ]
    return Pack.of(rollouts)


def disturb(lm: Any, seed: int) -> None:
    """An optimizer step of sorts."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))


def teacher(own: OwnWeights) -> SelfTeacher:
    vocab = own.lm.head().width
    return SelfTeacher(LocalTeacher(own.lm, alignment=SameIds(vocab), batch_tokens=64), own)


def logits(own: OwnWeights, pack: Pack, weights: Weights, temperature: float = 1.0) -> Tensor:
    signal = teacher(own).score(
        in_groups(pack.rollouts), ScoreRequest(self_view(weights), frozenset({DENSE}), temperature)
    )
    return signal.rows(slice(None)).logp_NV


# --- the weights ---


def test_the_formulas_against_a_loop_by_hand(lm: Any) -> None:
    """Every teacher's weights after each of seven steps are what a plain loop in float64 says."""
    own = OwnWeights(lm, [frozen(), ema(0.05), ema(0.3, every=2), hard_copy(3)])
    first = {name: p.double() for name, p in state(lm).items()}
    slow, steps, copied = dict(first), dict(first), dict(first)
    for update in range(1, 8):
        disturb(lm, update)
        own.moved(update)
        now = {name: p.double() for name, p in state(lm).items()}
        slow = {name: 0.95 * slow[name] + 0.05 * now[name] for name in now}
        if update % 2 == 0:
            steps = {name: 0.7 * steps[name] + 0.3 * now[name] for name in now}
        if update % 3 == 0:
            copied = now
        for weights, wanted in (
            (frozen(), first),
            (ema(0.05), slow),
            (ema(0.3, every=2), steps),
            (hard_copy(3), copied),
        ):
            for name, tensor in weights_of(own, weights).items():
                torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
    assert same(state(lm), {name: p.float() for name, p in now.items()})  # the student is put back, bit by bit


def test_rate_0_is_frozen_and_rate_1_is_live(lm: Any, pack: Pack) -> None:
    own = OwnWeights(lm, [frozen(), ema(0.0), ema(1.0), live(), trust_region(0.5)])
    first, said = state(lm), logits(own, pack, frozen())
    for update in range(1, 4):
        disturb(lm, update)
        own.moved(update)
        assert same(weights_of(own, ema(0.0)), first) and same(weights_of(own, frozen()), first)
        assert same(weights_of(own, ema(1.0)), state(lm)) and same(weights_of(own, live()), state(lm))
        assert torch.equal(logits(own, pack, frozen()), said)
        for weights, alike in (
            (ema(0.0), frozen()),
            (trust_region(0.0), frozen()),
            (trust_region(1.0), live()),
            (ema(1.0), live()),
        ):
            assert torch.equal(logits(own, pack, weights), logits(own, pack, alike)), weights
        assert not torch.equal(logits(own, pack, live()), said)


def test_a_trust_region_mixes_logits(lm: Any, pack: Pack) -> None:
    own = OwnWeights(lm, [trust_region(0.3)])
    disturb(lm, 1)
    own.moved(1)
    for temperature in (1.0, 2.0):
        mixed = 0.7 * logits(own, pack, frozen()).double() + 0.3 * logits(own, pack, live()).double()
        wanted = (mixed / temperature).log_softmax(-1)
        found = logits(own, pack, trust_region(0.3), temperature)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    # What is reduced at once says the same of the tokens written, and of the likeliest ids.
    needs = frozenset({SAMPLED, Need("topk", 3), Need("entropy")})
    rows = (
        teacher(own)
        .score(in_groups(pack.rollouts), ScoreRequest(self_view(trust_region(0.3)), needs))
        .rows(slice(None))
    )
    whole = logits(own, pack, trust_region(0.3))
    torch.testing.assert_close(rows.sampled_logp_N, whole.gather(1, pack.steps.tokens_N[:, None]).squeeze(1))
    torch.testing.assert_close(rows.topk(3)[1], whole.topk(3).values)


def test_what_is_kept(lm: Any) -> None:
    size = sum(4 * p.numel() for p in lm.model.parameters())
    for wanted, copies in (
        ([live()], 0),
        ([frozen()], 1),
        ([trust_region(0.1)], 1),
        ([trust_region(0.1), trust_region(0.2), frozen(), live()], 1),
        ([trust_region(1.0)], 0),
        ([ema(0.1)], 1),
        ([ema(0.1), ema(0.1), ema(0.1, every=2), hard_copy(5)], 3),
    ):
        own = OwnWeights(lm, wanted)
        assert own.bytes == copies * size, wanted
        assert own.from_start == (frozen() in [side for each in wanted for side, _ in sides_of(each)])
    assert own.tensors().keys() == {
        f"moving/{kind}/{name}"
        for kind in ("ema-0.1-1", "ema-0.1-2", "hard_copy-1.0-5")
        for name, _ in lm.model.named_parameters()
    }
    with pytest.raises(UserError, match="self-teachers move otherwise"):
        own.restore(OwnWeights(lm, [ema(0.2)]).tensors())
    with pytest.raises(UserError, match="self-teachers move otherwise"):
        own.restore({})


def test_only_what_learns_is_kept(lm: Any, pack: Pack) -> None:
    """As with an adapter: all else is the model's own, before and after."""
    lm.model.requires_grad_(False)
    learning = [layer.mlp.down_proj.weight.requires_grad_() for layer in lm.model.base_model.layers]
    own = OwnWeights(lm, [ema(0.5), frozen()], moves_within_batch=True)
    assert own.bytes == 2 * 4 * sum(p.numel() for p in learning)
    before, said = [p.detach().clone() for p in learning], logits(own, pack, frozen())
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(1.0)
    own.moved(1)
    with own.in_place(ema(0.5)):
        for parameter, old in zip(learning, before, strict=True):
            torch.testing.assert_close(parameter.detach(), old + 0.5)
        # The head does not learn, so nobody copies it.
        assert own.head(ema(0.5), lasting=True)().weight_VD.data_ptr() == lm.head().weight_VD.data_ptr()
    assert torch.equal(logits(own, pack, frozen()), said)


class Switched:
    """A student with an adapter that can be switched off, down to what `OwnWeights` asks of it."""

    def __init__(self, lm: Any, off: dict[str, Tensor]) -> None:
        self._lm, self._off, self.adapter = lm, off, object()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def without_adapter(self) -> Any:
        import contextlib

        @contextlib.contextmanager
        def off() -> Any:
            adapters = {name: p for name, p in self._lm.model.named_parameters() if p.requires_grad}
            on = {name: p.detach().clone() for name, p in adapters.items()}
            with torch.no_grad():
                for name, parameter in adapters.items():
                    parameter.copy_(self._off[name])
                yield
                for name, parameter in adapters.items():
                    parameter.copy_(on[name])

        return off()


def test_an_adapter_switched_off_is_the_frozen_student(lm: Any, pack: Pack) -> None:
    lm.model.requires_grad_(False)
    lm.model.base_model.layers[1].mlp.down_proj.weight.requires_grad_()
    off = {name: p.detach().clone() for name, p in lm.model.named_parameters() if p.requires_grad}
    own = OwnWeights(Switched(lm, off), [frozen(), trust_region(0.5)])  # type: ignore[arg-type]
    assert own.bytes == 0 and own.from_start
    said = logits(own, pack, frozen())
    disturbed = lm.model.base_model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        disturbed.add_(1.0)
    own.moved(1)
    assert torch.equal(logits(own, pack, frozen()), said)
    assert not torch.equal(logits(own, pack, live()), said)
    # An adapter that came with something learnt: switched off, it is not the student as it began.
    assert OwnWeights(Switched(lm, off), [frozen()]).bytes == 4 * disturbed.numel()  # type: ignore[arg-type]


# --- what was said stays said ---


@pytest.mark.parametrize("weights", [live(), ema(0.5), hard_copy(1), trust_region(0.5)], ids=lambda w: w.kind)
def test_an_answer_is_that_of_its_moment(lm: Any, pack: Pack, weights: Weights) -> None:
    needs, view = frozenset({DENSE}), self_view(weights)
    several = OwnWeights(lm, [weights], moves_within_batch=True)
    once = OwnWeights(lm, [weights])
    kept, guarded = (teacher(own).score(in_groups(pack.rollouts), ScoreRequest(view, needs)) for own in (several, once))
    said = kept.rows(slice(None)).logp_NV
    torch.testing.assert_close(guarded.rows(slice(None)).logp_NV, said)
    disturb(lm, 1)
    several.moved(1)
    once.moved(1)
    assert torch.equal(kept.rows(slice(None)).logp_NV, said)
    with pytest.raises(SignalError, match="moved after it had scored"):
        guarded.rows(slice(None))
    now = teacher(several).score(in_groups(pack.rollouts), ScoreRequest(view, needs))
    assert not torch.equal(now.rows(slice(None)).logp_NV, said)


def test_in_bf16_a_copied_head_says_the_same(lm: Any, pack: Pack) -> None:
    """It is kept in the dtype of the products, to which a head that is not copied is brought each time."""
    lm.precision = "bf16"
    needs, view = frozenset({DENSE}), self_view(live())
    several, once = (OwnWeights(lm, [live()], moves_within_batch=more) for more in (True, False))
    kept, guarded = (teacher(own).score(in_groups(pack.rollouts), ScoreRequest(view, needs)) for own in (several, once))
    assert torch.equal(kept.rows(slice(None)).logp_NV, guarded.rows(slice(None)).logp_NV)
    copied = several.head(live(), lasting=True)().weight_VD
    assert copied.dtype == torch.bfloat16 and lm.head().weight_VD.dtype == torch.float32


def test_the_head_is_copied_only_where_it_will_move(lm: Any) -> None:
    pointer = lm.head().weight_VD.data_ptr()
    several, once = (OwnWeights(lm, [live(), frozen()], moves_within_batch=more) for more in (True, False))
    assert several.head(live(), lasting=True)().weight_VD.data_ptr() != pointer
    assert several.head(live(), lasting=False)().weight_VD.data_ptr() == pointer
    assert once.head(live(), lasting=True)().weight_VD.data_ptr() == pointer
    with several.in_place(frozen()):
        pointer = lm.head().weight_VD.data_ptr()
        assert several.head(frozen(), lasting=True)().weight_VD.data_ptr() == pointer


@pytest.mark.parametrize(
    ("more", "again", "expected"),
    [
        ({"updates": 1}, False, False),
        ({"updates": 2}, False, True),
        ({"updates": 1, "epochs": 2}, False, True),
        ({"updates": 1}, True, True),
    ],
)
def test_when_weights_move_within_a_batch(
    alone: dict[str, Any], lm: Any, more: dict[str, int], again: bool, expected: bool
) -> None:
    """Several optimizer steps, or a controller that looks at the batch again after the last one."""
    method = self_taught(live())
    if again:
        looks = Controller("looks", observes={"entropy": student_entropy()}, again=True, against="self0")
        method = replace(method, controllers=(looks,))
    own = own_weights(settings(alone, method, optimizer=more), method, lm)
    assert own is not None and own.moves_within_batch == expected


def test_in_the_second_update_the_live_teacher_is_the_one_of_the_first(
    alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both updates learn from what was said before the first: recorded as the run reads it, chunk by chunk."""
    run = started(alone, tmp_path / "run", live(), steps=1, optimizer={"updates": 2})
    found: list[Any] = []
    kept: list[Tensor] = []
    score = SelfTeacher.score

    def listening(self: SelfTeacher, *arguments: Any) -> Any:
        signal = score(self, *arguments)
        found.append(signal)
        kept.append(signal.rows(slice(None)).logp_NV.clone())
        return signal

    monkeypatch.setattr(SelfTeacher, "score", listening)
    before = state(run.student)
    run.go()
    assert run.updates == 2 and not same(state(run.student), before)
    assert len(found) == 1
    assert torch.equal(found[0].rows(slice(None)).logp_NV, kept[0])


# --- runs ---

MOVING = [ema(0.3), ema(0.5, every=3), hard_copy(3), trust_region(0.4), frozen(), live()]


def test_frozen_is_the_same_for_the_whole_run(alone: dict[str, Any], tmp_path: Path) -> None:
    run = started(alone, tmp_path / "run", frozen())
    first = state(run.student)
    run.go()
    own = run.prepared.teachers.own
    assert own is not None and same(weights_of(own, frozen()), first)
    assert not same(state(run.student), first)
    assert "teacher_lag" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("kind", ["loop", "checkpointed"])
def test_ema_of_a_run_against_a_loop_by_hand(alone: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """The formula over the student's weights after each single optimizer step, two of them in every batch."""
    checkpointing = {"gradient_checkpointing": True} if kind == "checkpointed" else {}
    run = started(alone, tmp_path / "run", ema(0.3), ema(0.5, every=3), optimizer={"updates": 2, **checkpointing})
    own, lm = run.prepared.teachers.own, run.student
    assert own is not None
    one = two = {name: p.double() for name, p in state(lm).items()}
    moved = own.moved

    def both(updates: int) -> None:
        nonlocal one, two
        moved(updates)
        now = {name: p.double() for name, p in state(lm).items()}
        one = {name: 0.7 * one[name] + 0.3 * now[name] for name in now}
        if updates % 3 == 0:
            two = {name: 0.5 * two[name] + 0.5 * now[name] for name in now}

    run.learner.moved = both
    run.go()
    assert run.updates == 8
    for weights, wanted in ((ema(0.3), one), (ema(0.5, every=3), two)):
        for name, tensor in weights_of(own, weights).items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    size = sum(float(p.double().square().sum()) for p in state(lm).values())
    apart = sum(float((p.double() - one[name]).square().sum()) for name, p in state(lm).items())
    assert row["teacher_lag/ema-0.3-1"] == pytest.approx((apart / size) ** 0.5, rel=1e-4)
    assert row["teacher_lag/ema-0.5-3"] > 0


@pytest.mark.parametrize("weights", MOVING, ids=lambda w: f"{w.kind}-{w.every}")
def test_a_resumed_run_is_the_same(alone: dict[str, Any], tmp_path: Path, weights: Weights) -> None:
    """Two updates a batch; stopped after three batches, so that a count of three is not at its beginning."""
    whole = started(alone, tmp_path / "whole", weights, checkpoint={"every": 3, "keep": 5}).go()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    again = runner.resume(tmp_path / "parts" / "checkpoints" / "step-3", method=self_taught(weights))
    assert again.step == 3 and again.updates == 6
    assert not same(state(whole.student), state(again.student))
    again.go()
    assert same(state(whole.student), state(again.student))
    ours, theirs = whole.teachers.own, again.teachers.own
    assert ours is not None and theirs is not None
    for side, _ in sides_of(weights):
        assert same(weights_of(ours, side), weights_of(theirs, side))
    lines = [
        [
            {name: value for name, value in json.loads(line).items() if not name.startswith(("time", "tokens_per"))}
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in ("whole", "parts")
    ]
    assert lines[0] == lines[1]
    assert ("teacher_lag" in lines[0][0]) == weights.stateful


@pytest.mark.parametrize("weights", [frozen(), trust_region(0.4)], ids=lambda w: w.kind)
def test_after_a_resume_frozen_is_the_student_before_training(
    alone: dict[str, Any], tmp_path: Path, weights: Weights, model_folder: Callable[..., Path]
) -> None:
    run = started(alone, tmp_path / "run", weights, steps=2)
    first = state(run.student)
    run.go()
    again = runner.resume(tmp_path / "run", steps=3, method=self_taught(weights))
    own = again.teachers.own
    assert own is not None and same(weights_of(own, frozen()), first)
    assert same(state(again.student), state(run.student)) and not same(state(run.student), first)
    written = tmp_path / "run" / "config.json"
    config = json.loads(written.read_text())
    written.write_text(json.dumps({**config, "student": str(model_folder(seed=5))}))
    with pytest.raises(UserError, match="the teacher is the student as it was before training; put the same student"):
        runner.resume(tmp_path / "run", steps=3, method=self_taught(weights))


def test_another_movement_is_another_run(alone: dict[str, Any], tmp_path: Path) -> None:
    started(alone, tmp_path / "run", ema(0.3), steps=1).go()
    with pytest.raises(UserError, match="self-teachers move otherwise"):
        runner.resume(tmp_path / "run", steps=2, method=self_taught(ema(0.4)))


# --- without a teacher ---


def test_a_run_without_a_teacher(alone: dict[str, Any], tmp_path: Path) -> None:
    """Everything that is written says only what there is."""
    run = started(alone, tmp_path / "run", ema(0.3), eval={"every": 2, "teacher": True})
    setup = run.prepared
    assert (
        setup.teachers.lms.get("teacher") is None
        and setup.source.teacher_generator is None
        and set(setup.teachers.behind(setup.method)) == {"self0"}
    )
    assert summary(setup)["teacher"] == "the student itself, an average that takes 0.3 of it every optimizer step"
    size = sum(4 * p.numel() for p in setup.student.model.parameters())
    assert forecast(setup).models == 2 * size
    run.go()
    table = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert [row["who"] for row in table["rows"]] == ["student before", "student after"]
    assert not table["gap_recovered"]
    for row in table["rows"]:
        assert {"avg@2", "length", "student_entropy"} <= row.keys()
        assert not row.keys() & {"reverse_kl", "uncertain", "forward_kl_uncertain", "teacher_entropy_uncertain"}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "- teacher: the student itself, an average that takes 0.3 of it" in card and "None" not in card
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher"] is None
    page = api.write_report(tmp_path / "run").read_text()
    assert "Moving teacher’s distance" in page
    for word in (">NaN", "NaN<", "Teacher’s entropy", "Reverse KL by", "<dt>Teacher</dt>", ">teacher<"):
        assert word not in page, word


def test_without_answers_no_step_is_the_best(alone: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{a} + {b} ="} for a in range(1, 6) for b in range(1, 6)]
    path = tmp_path / "bare.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = {name: value for name, value in alone.items() if name != "task"}
    run = started({**bare, "data": str(path)}, tmp_path / "run", ema(0.3), steps=2, eval={"every": 1}).go()
    assert run.best is None


def test_doctor_looks_at_what_there_is(alone: dict[str, Any]) -> None:
    method = self_taught(frozen())
    found = examine_setup(prepare(settings(alone, method), method))
    names = [check.name for check in found.checks]
    assert "memory" in names and "noise floor" in names and "stopping" in names
    assert not {"teacher is loaded", "teacher repeats", "stop token", "teachability"} & set(names)
    assert found.verdict != "fatal"


def test_a_teacher_that_nobody_asks(alone: dict[str, Any], tiny_run: dict[str, Any]) -> None:
    method = self_taught(frozen())
    with pytest.raises(
        UserError, match=r"teacher = .* is given, but method 'self_taught' teaches itself; leave it out"
    ):
        prepare(settings(tiny_run, method), method)
    with pytest.raises(UserError, match="teacher is missing .view 'teacher' of method 'opd' is of a teacher.: give"):
        prepare(api.assemble(alone, {"method": "opd"}))
    by_teacher = replace(method, rollout=RolloutPlan(on_policy_fraction=0.5, off_policy="teacher"))
    with pytest.raises(UserError, match="the answers of method 'self_taught' are a teacher's"):
        prepare(settings(alone, by_teacher), by_teacher)
    with pytest.raises(UserError, match="data is missing .the student of method 'self_taught' teaches itself"):
        prepare(settings({**alone, "data": None}, method), method)


def test_the_built_in_teacher_is_left_out_quietly(tmp_path: Path) -> None:
    method = self_taught(live())
    config = settings({}, method, limit=8, eval={"problems": 0}, device="cpu")
    assert config.teacher == "countdown:teacher"
    run = runner.start(config, tmp_path / "run", Silent(), method=method)
    assert run.prepared.teachers.lms.get("teacher") is None and run.prepared.config.teacher is None
    run.open()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["teacher"] is None


def test_the_built_in_teacher_is_left_out_also_where_it_is_named_for_another_task() -> None:
    config = api.assemble({"data": "bait", "method": {"name": "opct"}})
    assert config.teacher == "coached:teacher"
    assert without_idle_teacher(config, registry.load("opct")).teacher is None
    with pytest.raises(UserError, match="teaches itself; leave it out"):
        without_idle_teacher(config.model_copy(update={"teacher": "countdown:teacher"}), registry.load("opct"))


def test_beside_a_teacher(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Both at once: each view has its own model, and the summary and the card name both."""
    own = self_taught(ema(0.3))
    terms = (*own.terms, Term("theirs", pathwise(forward_kl())))
    method = replace(own, terms=terms, views={**own.views, "teacher": View.same_prompt()})
    run = runner.start(settings(tiny_run, method, steps=1), tmp_path / "run", method=method)
    assert (
        run.prepared.teachers.lms.get("teacher") is not None and run.prepared.learner.vocab == run.student.head().width
    )
    assert isinstance(run.prepared.teachers.behind(run.prepared.method)["self0"], SelfTeacher)
    assert isinstance(run.prepared.teachers.behind(run.prepared.method)["teacher"], LocalTeacher)
    run.go()
    assert (
        "the student itself" in summary(run.prepared)["teacher"] and "parameters;" in summary(run.prepared)["teacher"]
    )
    assert export.card(run.prepared, {}, 1).count("- teacher: ") == 2


def test_after_a_cold_start(alone: dict[str, Any], tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """On the data's answers it asks nobody; a real teacher's go to the cold start alone, whatever the views' names."""
    method = self_taught(frozen())
    cold = {"cold_start": {"steps": 2, "answers": "dataset"}}
    run = runner.start(settings(alone, method, **cold), tmp_path / "alone", method=method)
    first = state(run.student)
    run.go()
    own = run.prepared.teachers.own
    assert own is not None and same(weights_of(own, frozen()), first)
    named = replace(
        method,
        views={"teacher": self_view(frozen())},
        terms=(Term("forward", pathwise(forward_kl())),),
    )
    cold = {"cold_start": {"steps": 2, "loss": "forward_kl"}}
    both = prepare(settings(tiny_run, named, **cold), named)
    behind = [both.teachers.behind(phase)["teacher"] for _, phase in both.phases]
    assert [type(teacher) for teacher in behind] == [LocalTeacher, SelfTeacher]
