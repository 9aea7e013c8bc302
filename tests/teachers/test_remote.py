"""A teacher that answers a few numbers about each token serves whatever asks for no more than that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pipeline
import pytest
import torch
from remote import RemoteTeacher
from torch import Tensor
from toy import Toy

from retort import config as configuration
from retort import registry
from retort.controllers import Controller, Probe
from retort.core.context import Context
from retort.core.needs import DENSE, SAMPLED, Need, NeedKind, logp_at
from retort.core.rollouts import Group, in_groups
from retort.core.signals import Candidates, Dense, Sampled, TeacherSignal
from retort.divergences.support import student_topk
from retort.errors import RunError, SignalError, UserError
from retort.evaluate.trust import Protocol, branches
from retort.loss.terms import check_needs
from retort.method import Method
from retort.quantities import teacher_margin
from retort.teachers.base import ScoreRequest, view_signals
from retort.teachers.local import reduced
from retort.teachers.view import View
from retort.train import runner
from retort.train.learning.passes import Passes
from retort.train.output.text import TextOutput
from retort.train.run import Run

#: What a remote teacher serves, by method and settings.
SERVED: list[tuple[str, dict[str, Any]]] = [
    ("vopd", {"top_k": 5}),
    ("sdpo", {"top_k": 5}),
    ("peer_opd", {"top_k": 5, "divergence": "reverse_kl", "tail": "renormalised"}),
    ("topk_kl", {"top_k": 5}),
    ("local_teachability", {"max_segment": 2, "shortest": 1}),
]
#: Further settings of parts that ask for the student's ids, some of them for the teacher's, too.
ALSO: list[tuple[str, dict[str, Any]]] = [
    ("sdpo", {}),  # as many ids as there are
    ("topk_kl", {"top_k": 10**9, "tail": "bucket", "direction": "forward"}),
    ("topk_kl", {"top_k": 5, "tail": "bucket", "direction": "forward"}),
    ("topk_kl", {"top_k": 5, "support": "union", "tail": "bucket"}),
    ("topk_kl", {"top_k": 5, "support": "intersection"}),
    ("topk_score", {"top_k": 5}),
    ("topk_score", {"top_k": 5, "support": "symmetric_difference", "weighting": "teacher"}),
    ("local_teachability", {"of": "eopd", "top_k": 3, "margin": "advantage"}),
    ("local_teachability", {"of": "vopd", "settings": {"top_k": 6}, "margin": "gap"}),
]


def asks_for_ids(method: Method) -> bool:
    return any(need.kind == "logp_at" for view in method.views for need in method.needs(view))


def named(cases: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    return ["-".join([name, *(f"{key}={value}" for key, value in given.items())]) for name, given in cases]


DEFAULTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in registry.for_tokens()]
EVERY = [case for case in [*DEFAULTS, *SERVED, *ALSO[1:]] if asks_for_ids(registry.load(case[0], **case[1]))]


def test_these_methods_ask_for_no_whole_distribution() -> None:
    remote = frozenset[NeedKind]({"sampled", "logp_at"})
    for name, given in SERVED:
        method = registry.load(name, **given)
        check_needs(method, dict.fromkeys(method.views, remote))
    with pytest.raises(
        UserError, match="needs the whole distribution from 'teacher'; that teacher gives only: logp_at"
    ):
        check_needs(registry.load("vopd", top_k=None), {"teacher": remote})
    with pytest.raises(UserError, match="needs log-probs of the student's top-20 from 'teacher'"):
        check_needs(registry.load("vopd"), {"teacher": frozenset({"sampled"})})


# --- the loss ---


def about(toy: Toy, method: Method, view: str) -> TeacherSignal:
    """What a view says, cut down to what the method needs of it."""
    hidden, head = toy.view(view)
    whole = Dense.of(hidden @ head.T, toy.tokens, source=view, temperature=method.temperature)
    needs = method.needs(view)
    k = max((need.k for need in needs if need.kind == "logp_at"), default=0)
    if not k:
        return whole
    ids_NK = (toy.logits.detach() / method.temperature).topk(min(k, toy.vocab)).indices
    found = reduced(whole, needs, ids_NK)
    assert isinstance(found, Candidates)
    return found


@pytest.mark.parametrize(("name", "given"), EVERY, ids=named(EVERY))
def test_the_loss_from_candidates_is_that_of_the_whole_distribution(name: str, given: dict[str, Any]) -> None:
    toy, method = Toy(), registry.load(name, **given)
    views = {view: about(toy, method, view) for view in method.views}
    dense = toy.losses(method, old_logp=toy.old)
    wanted = toy.gradients(dense.loss)
    assert max(float(gradient.abs().max()) for gradient in wanted) > 0
    ours = toy.losses(method, old_logp=toy.old, teacher_logits=views.get("teacher"), extra_views=_others(views))
    chunked = toy.linear(method, old_logp=toy.old, teacher_hidden=None, teacher_head=None, extra_views=views, chunk=5)
    for found in (ours, chunked):
        torch.testing.assert_close(found.loss, dense.loss, rtol=1e-6, atol=1e-6)
        for gradient, expected in zip(toy.gradients(found.loss), wanted, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def _others(views: dict[str, TeacherSignal]) -> dict[str, TeacherSignal]:
    return {name: signal for name, signal in views.items() if name != "teacher"}


def test_too_few_candidates_and_ids_that_the_student_lacks_are_refused() -> None:
    toy, method = Toy(), registry.load("topk_kl", top_k=5)
    signal = about(toy, method, "teacher")
    with pytest.raises(UserError, match="student's top-9 from 'teacher', which gives those of 5 ids"):
        toy.losses(registry.load("topk_kl", top_k=9), teacher_logits=signal)
    with pytest.raises(UserError, match="names id 22; the student's vocabulary has 22"):
        toy.losses(method, teacher_logits=signal, student_logits=toy.logits[:, :22])


def test_the_ids_are_those_that_the_teacher_was_asked_about_and_live_where_it_knows_all() -> None:
    draw = torch.Generator().manual_seed(0)
    then, now, theirs = (torch.randn(4, 9, generator=draw, dtype=torch.float64) for _ in range(3))
    tokens = torch.zeros(4, dtype=torch.long)
    dense = Dense.of(theirs, tokens)
    held = reduced(dense, frozenset({logp_at(3)}), then.topk(3).indices)
    for signal, expected in ((held, then.topk(2).indices), (dense, now.topk(2).indices)):
        context = Context.from_logits(now, tokens, {"teacher": signal.rows(slice(None), 9)})
        ids_NK, logp_NK = student_topk(context, "teacher", 2)
        assert torch.equal(ids_NK, expected)
        torch.testing.assert_close(logp_NK, now.log_softmax(-1).gather(1, ids_NK))
        torch.testing.assert_close(context.signal("teacher").logp_at(ids_NK), theirs.log_softmax(-1).gather(1, ids_NK))


# --- a run ---


@pytest.mark.parametrize(("name", "given"), SERVED, ids=named(SERVED))
def test_a_step_with_a_remote_teacher_is_one_with_a_local_one(
    name: str, given: dict[str, Any], tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient; and a teacher that can hand over all costs no pass of the student."""
    setup = pipeline.prepared(tiny_run, name, **given)
    far = setup.teachers.with_models({name: RemoteTeacher(own) for name, own in setup.teachers.models.items()})
    pack = pipeline.ragged(setup)
    ours = pipeline.as_run(replace(setup, teachers=far), pack, 20)
    assert [len(teacher.asked) for teacher in far.models.values()] == [1] * len(far.models)
    monkeypatch.setattr(Passes, "top_ids", lambda *_: pytest.fail("nobody has to be given ids"))
    theirs = pipeline.as_run(setup, pack, 20)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.loss == pytest.approx(expected.loss, rel=1e-6, abs=1e-6)
        largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
        assert largest > 0
        for parameter, gradient in mine.gradients.items():
            torch.testing.assert_close(gradient, expected.gradients[parameter], rtol=1e-5, atol=2e-6 * largest)


def test_a_run_with_a_remote_teacher(tiny_run: dict[str, Any], tmp_path: Any) -> None:
    sections = {"method": {"name": "vopd", "top_k": 4}, "steps": 2, "eval": {"problems": 0}}
    run = runner.start(configuration.resolve(configuration.merge(tiny_run, sections)), tmp_path)
    far = RemoteTeacher(run.teachers.models["teacher"])
    run.teachers = run.teachers.with_models({"teacher": far})
    run.go()
    assert [ask.needs for ask in far.asked] == [frozenset({SAMPLED, logp_at(4)})] * 2
    assert all(ask.student_ids_NK is not None and ask.student_ids_NK.shape[1] == 4 for ask in far.asked)
    assert "baseline" in run.metrics[-1] and "gradient_variance" not in run.metrics[-1]


def test_the_ids_are_the_students_most_likely_at_the_temperature_of_the_loss(tiny_run: dict[str, Any]) -> None:
    setup = pipeline.prepared(tiny_run, "topk_kl", temperature=0.5)
    pack = pipeline.ragged(setup)
    logits_NV = pipeline.student_logits(setup, pack)
    for k in (3, 10**9):
        ids_NK = setup.learner.passes.top_ids(setup.method, pack, k)
        assert ids_NK.dtype == torch.long and not ids_NK.is_cuda
        found_NK = logits_NV.gather(1, ids_NK)
        torch.testing.assert_close(found_NK, logits_NV.topk(min(k, setup.learner.vocab)).values, rtol=1e-4, atol=1e-5)


def test_a_probe_asks_a_remote_teacher_in_the_same_way(tiny_run: dict[str, Any], tmp_path: Any) -> None:
    looks = Controller("looks", probe=Probe(parts={"margin": teacher_margin(4)}, every=1, prompts=2))
    setup = pipeline.prepared(tiny_run, "opd")
    source, method = replace(setup.source, probe=setup.source.prompts[:2]), replace(setup.method, controllers=(looks,))
    setup = replace(setup, method=method, source=source)
    remote = {name: RemoteTeacher(own) for name, own in setup.teachers.models.items()}
    far = replace(setup, teachers=setup.teachers.with_models(remote))
    clock = replace(pipeline.CLOCK, longest=source.limit)
    runs = [Run(TextOutput(own), tmp_path) for own in (far, setup)]
    found, expected = (run.control.probe(method, clock, partial(run.probes.measure, method)) for run in runs)
    assert found.keys() == {"probe/looks.margin"}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_candidate_that_is_ruled_out_is_named(tiny_run: dict[str, Any]) -> None:
    """A reverse KL on the student's ids is infinite there, and the run stops before it learns."""
    setup = pipeline.prepared(tiny_run, "topk_kl", top_k=3)
    pack = pipeline.ragged(setup)
    first = int(setup.learner.passes.top_ids(setup.method, pack, 3)[0, 1])

    def said(tokens_N: Tensor, ask: ScoreRequest) -> TeacherSignal:
        found = candidates(tokens_N, ask)
        assert isinstance(found, Candidates)
        logp_NK = found.logp_NK.clone()
        logp_NK[0, 1] = float("-inf")
        return replace(found, logp_NK=logp_NK)

    scripted = Scripted({"sampled", "logp_at"}, said)
    far = replace(setup, teachers=setup.teachers.with_models({"teacher": scripted}))
    with pytest.raises(RunError, match=f"infinite at token 0 .* probability 0 to id {first} "):
        pipeline.as_run(far, pack, 10**6)


# --- what is asked, and what is taken for an answer ---


class Scripted:
    """Answers with whatever it is told to."""

    name = "scripted"

    def __init__(self, capabilities: set[NeedKind], said: Any) -> None:
        self.capabilities, self.said = frozenset(capabilities), said
        self.asked: list[ScoreRequest] = []

    def score(self, groups: Sequence[Group], ask: ScoreRequest) -> TeacherSignal:
        self.asked.append(ask)
        return self.said(torch.cat([own.sequence.actions_A for group in groups for own in group]), ask)


def candidates(tokens_N: Tensor, ask: ScoreRequest) -> TeacherSignal:
    assert ask.student_ids_NK is not None
    logp_NK = torch.full(ask.student_ids_NK.shape, -3.0)
    return Candidates(tokens_N, "scripted", ask.student_ids_NK, logp_NK, torch.full(tokens_N.shape, -1.0))


def asked(teachers: dict[str, Any], needs: dict[str, set[Need]], groups: list[Group], ids: Any) -> dict[str, Any]:
    views = {name: View() for name in teachers}
    return view_signals(teachers, views, groups, lambda view: frozenset(needs[view]), 1.0, ids)


@pytest.fixture
def groups(tiny_run: dict[str, Any]) -> list[Group]:
    return in_groups(pipeline.ragged(pipeline.prepared(tiny_run, "opd")).rollouts)


def test_ids_are_taken_once_for_the_longest_wish_and_given_to_those_who_need_them(groups: list[Group]) -> None:
    taken: list[int] = []
    steps = sum(own.steps for group in groups for own in group)

    def ids(k: int) -> Tensor:
        taken.append(k)
        return torch.arange(k).expand(steps, k)

    few, many = (Scripted({"sampled", "logp_at"}, candidates) for _ in range(2))
    whole = Scripted({"dense"}, lambda tokens_N, _: Dense.of(torch.zeros(steps, 61), tokens_N))
    plain = Scripted({"sampled", "logp_at"}, lambda tokens_N, _: Sampled(tokens_N, "s", torch.zeros(steps)))
    teachers = {"few": few, "many": many, "whole": whole, "plain": plain}
    needs = {"few": {logp_at(2)}, "many": {logp_at(5), logp_at(3)}, "whole": {logp_at(9)}, "plain": {SAMPLED}}
    asked(teachers, needs, groups, ids)
    assert taken == [5]
    given = {name: teacher.asked[0].student_ids_NK for name, teacher in teachers.items()}
    widths = {name: None if own is None else own.shape[1] for name, own in given.items()}
    assert widths == {"few": 2, "many": 5, "whole": None, "plain": None}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            lambda t, a: replace(candidates(t, a), ids_NK=a.student_ids_NK.flip(1)),  # type: ignore[attr-defined]
            "asked for id 0, and gave id 1",
        ),
        (
            lambda t, a: candidates(t, replace(a, student_ids_NK=a.student_ids_NK[:, :1])),
            "was asked for ids",
        ),
        (lambda t, a: candidates(t + 1, a), "misaligned at step 0"),
        (lambda t, a: Sampled(t, "scripted", torch.zeros(len(t))), "log-probs of the student's top-2, and gave only"),
    ],
)
def test_an_answer_about_something_else_is_refused(groups: list[Group], said: Any, message: str) -> None:
    steps = sum(own.steps for group in groups for own in group)
    teacher = Scripted({"sampled", "logp_at"}, said)
    with pytest.raises(SignalError, match=message):
        asked({"teacher": teacher}, {"teacher": {logp_at(2)}}, groups, lambda k: torch.arange(k).expand(steps, k))


def test_trust_needs_a_whole_distribution_and_says_so_before_anything_is_written() -> None:
    nobody: Any = None
    with pytest.raises(UserError, match="from the whole distribution of the teacher, and scripted gives only: sampled"):
        branches(nobody, Scripted({"sampled"}, nobody), View(), [], nobody, Protocol())


def test_groups_are_neighbours_of_one_visit_and_keep_their_order(groups: list[Group]) -> None:
    rollouts = [own for group in groups for own in group]
    assert [len(group) for group in groups] == [2, 1, 1, 1]
    again = in_groups([replace(own, visit=own.member % 2) for own in rollouts])
    assert [len(group) for group in again] == [1] * 5
    assert [own.member for group in again for own in group] == [own.member for own in rollouts]
    assert in_groups([]) == []


def test_only_a_whole_answer_keeps_what_makes_one() -> None:
    ids_NK = torch.zeros(1, 1, dtype=torch.long)
    assert ScoreRequest(View(), frozenset({DENSE, SAMPLED})).whole
    assert ScoreRequest(View(), frozenset({logp_at(3)})).whole
    assert not ScoreRequest(View(), frozenset({logp_at(3), SAMPLED}), 1.0, ids_NK).whole
    assert not ScoreRequest(View(), frozenset({Need("topk", 3)})).whole
