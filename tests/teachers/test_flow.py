"""Flow models as teachers: Gaussians about the student's own steps, alone and routed by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from flows.linear import Linear, model
from flows.paths import prompts, rollouts, sampling

from retort.core.gaussian import Gaussian as Policy
from retort.core.needs import DENSE, GAUSSIAN, POLICY, SAMPLED, can_meet
from retort.core.rollouts import Group, Pack, Prompt, Rollout, in_groups
from retort.core.sequences import TokenSequence
from retort.core.signals import Gaussian, Sampled, TeacherSignal, joined
from retort.divergences import gaussian_kl
from retort.errors import SignalError, UserError
from retort.flows import FlowModel
from retort.flows.steps import DecidedSteps, step_of
from retort.loss.latents import latent_losses
from retort.ranks import World, world
from retort.registry import load
from retort.teachers.base import ScoreRequest, Teacher, view_signals
from retort.teachers.flow import FlowTeacher, refuse_other_flow, refuse_other_prompts
from retort.teachers.mixture import MixtureTeacher
from retort.teachers.routed import BestTeacher, RoutedTeacher
from retort.teachers.view import View
from retort.teachers.views import privileged

ASK = ScoreRequest(View(), frozenset({SAMPLED, GAUSSIAN}))


@dataclass
class Heard:
    """A teacher that remembers which prompts it was asked about."""

    behind: Teacher
    prompts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, self.capabilities = self.behind.name, self.behind.capabilities

    def score(self, groups: Sequence[Group], request: ScoreRequest) -> TeacherSignal:
        self.prompts += [group[0].prompt.id for group in groups]
        return self.behind.score(groups, request)


def teacher(seed: int = 3, *, batch: int = 5) -> FlowTeacher:
    return FlowTeacher(model(seed=seed, guidance=2.0, name=f"expert {seed}"), batch=batch)


def by_domain(prompt: Prompt) -> str:
    return prompt.domain


def asked(teachers: dict[str, Teacher], groups: list[Group], needs: Any = GAUSSIAN) -> dict[str, TeacherSignal]:
    """As a run asks."""
    views = {name: View() for name in teachers}
    return view_signals(teachers, views, groups, lambda _: frozenset({needs}), 1.0, lambda k: torch.zeros(0, k))


def test_it_gives_its_gaussian_at_the_steps_of_the_groups() -> None:
    own, expert = rollouts(), teacher()
    signal = asked({"teacher": expert}, in_groups(own))["teacher"]
    assert isinstance(signal, Gaussian)
    steps = DecidedSteps.of_rollouts(own)
    mean, std_N = step_of(expert.model, steps)
    torch.testing.assert_close(signal.mean_ND, mean.flatten(1).detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(signal.std_N, std_N)
    signal.check_decided(steps.decided_ND)
    signal.check_tokens(Pack.of(own).steps.tokens_N)
    assert signal.source == "expert 3"
    assert signal.valid_N is None
    by_torch = torch.distributions.Normal(mean, std_N[:, None, None]).log_prob(steps.next_latents).sum((1, 2))
    torch.testing.assert_close(signal.rows(slice(None)).sampled_logp_N, by_torch.detach(), rtol=1e-11, atol=1e-11)


def test_it_asks_its_model_for_no_more_rows_at_once_than_it_may_and_without_gradient() -> None:
    expert = FlowTeacher(model(seed=3), batch=7)
    signal = expert.score(in_groups(rollouts()), ASK)
    assert isinstance(expert.model.of, Linear)
    assert expert.model.of.rows == [7, 7, 7, 3]
    assert not signal.mean_ND.requires_grad
    assert expert.model.of.module.weight.requires_grad


def test_the_same_model_is_exactly_nothing_away() -> None:
    student = model(seed=3, guidance=2.0)
    own = rollouts(student)
    signal = FlowTeacher(student, batch=64).score(in_groups(own), ASK)
    mean, std_N = step_of(student, DecidedSteps.of_rollouts(own))
    kl_N = Policy(mean.flatten(1), std_N).reverse_kl(signal.rows(slice(None)).policy)
    assert torch.equal(kl_N, torch.zeros_like(kl_N))


def test_the_other_order_of_groups_is_the_other_order_of_steps() -> None:
    groups, expert = in_groups(rollouts()), teacher()
    first, turned = expert.score(groups, ASK), expert.score(groups[::-1], ASK)
    torch.testing.assert_close(turned.mean_ND[:8], first.mean_ND[16:], rtol=1e-12, atol=1e-12)


def test_its_capabilities_are_those_of_a_gaussian() -> None:
    assert [can_meet(teacher().capabilities, need) for need in (SAMPLED, GAUSSIAN, POLICY, DENSE)] == [
        True,
        True,
        True,
        False,
    ]


def test_any_prompt_but_the_students_own_is_refused() -> None:
    groups = in_groups(rollouts())
    shown = privileged("solution", model="teacher")
    with pytest.raises(UserError, match="view 'expert 3': a flow model reads the student's own prompt") as refused:
        teacher().score(groups, replace(ASK, view=shown))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="view 'hint'"):
        refuse_other_prompts({"teacher": View(), "hint": shown})
    with pytest.raises(UserError, match="view 'left'"):
        refuse_other_prompts({"left": View(leaves_out=lambda _: True)})
    refuse_other_prompts({"teacher": View(), "base": View.base(), "own": View(model="student")})


def test_a_rollout_of_tokens_is_refused() -> None:
    text = Rollout(prompts()[0], TokenSequence.of([1]).then([2], decided=True))
    with pytest.raises(UserError, match="prompt 'a ring': its rollout is no trajectory"):
        teacher().score([(text,)], ASK)


def test_a_model_that_is_not_finite_is_named() -> None:
    expert = teacher()
    with torch.no_grad():
        expert.model.of.module.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(SignalError, match="expert 3: the mean is not finite"):
        expert.score(in_groups(rollouts()), ASK)


def test_each_prompt_has_its_expert_and_the_other_one_is_not_used() -> None:
    """Of mixed batches each step is its expert's own, to the bit; of one domain alone the other is never asked."""
    own = rollouts()
    groups = in_groups(own)
    experts = {"ring": Heard(teacher(3)), "moons": Heard(teacher(4))}
    routed = RoutedTeacher(experts, by_domain)
    signal = asked({"teacher": routed}, groups)["teacher"]
    assert isinstance(signal, Gaussian)
    signal.check_decided(DecidedSteps.of_rollouts(own).decided_ND)
    ring, moons = experts["ring"].behind, experts["moons"].behind
    mean_ND = torch.cat(
        [ring.score([groups[0], groups[2]], ASK).mean_ND, moons.score([groups[1]], ASK).mean_ND]  # type: ignore[attr-defined]
    )
    place_N = torch.cat([torch.arange(8), torch.arange(16, 24), torch.arange(8, 16)])
    assert torch.equal(signal.mean_ND, mean_ND[place_N])
    assert experts["ring"].prompts == ["a ring", "a"]
    assert experts["moons"].prompts == ["two moons, and a third"]
    assert signal.counts == {"spoke/ring": 16.0, "spoke/moons": 8.0}
    before = len(experts["moons"].prompts)
    routed.score([groups[0]], ASK)
    assert len(experts["moons"].prompts) == before, "no prompt of the batch is its"


def test_what_the_other_expert_knows_changes_nothing() -> None:
    """Neither value nor gradient of the loss on prompts of one domain depends on the other expert."""
    own = [one for one in rollouts() if one.prompt.domain == "ring"]
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for seed in (4, 9):
        student = model()
        routed = RoutedTeacher({"ring": teacher(3), "moons": teacher(seed)}, by_domain)
        signal = routed.score(in_groups(own), ASK)
        steps = DecidedSteps.of_rollouts(own)
        mean, std_N = step_of(student, steps)
        assert isinstance(signal, Gaussian)
        losses = latent_losses(load("flow_opd"), Policy(mean.flatten(1), std_N), steps.decided_ND, {"teacher": signal})
        losses.loss.backward()
        found.append((losses.loss.detach(), student.of.module.weight.grad))  # type: ignore[union-attr,arg-type]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_routed_experts_meet_the_needs_of_methods_of_latents() -> None:
    routed = RoutedTeacher({"ring": teacher(3), "moons": teacher(4)}, by_domain)
    assert [can_meet(routed.capabilities, need) for need in (SAMPLED, GAUSSIAN, POLICY, DENSE)] == [
        True,
        True,
        True,
        False,
    ]
    text = Heard(teacher(4))
    text.capabilities = frozenset({"sampled"})
    assert not can_meet(RoutedTeacher({"ring": teacher(3), "moons": text}, by_domain).capabilities, GAUSSIAN)


@pytest.mark.parametrize("kind", [MixtureTeacher, BestTeacher])
def test_of_several_gaussians_together_there_is_none(kind: Callable[[dict[str, Teacher]], Teacher]) -> None:
    with pytest.raises(UserError, match=r"teachers.combine: ring scores denoising steps.*use combine = route"):
        kind({"ring": teacher(3), "moons": teacher(4)})


def test_joined_signals_keep_each_step_and_what_is_not_valid() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [
        Gaussian.of(*(torch.randn(3, 2, generator=draw), torch.rand(3, generator=draw) + 0.1), torch.zeros(3, 2))
        for _ in range(2)
    ]
    parts[1] = replace(parts[1], valid_N=torch.tensor([True, False, True]))
    found = joined(parts, torch.tensor([1, 0, 1, 0]), torch.tensor([1, 2, 0, 0]))
    assert isinstance(found, Gaussian)
    assert torch.equal(
        found.mean_ND, torch.stack([parts[1].mean_ND[1], parts[0].mean_ND[2], parts[1].mean_ND[0], parts[0].mean_ND[0]])
    )
    assert found.std_N.tolist() == [parts[1].std_N[1], parts[0].std_N[2], parts[1].std_N[0], parts[0].std_N[0]]
    assert found.valid_N is not None
    assert found.valid_N.tolist() == [False, True, True, True]
    with pytest.raises(SignalError, match=r"must be of one kind, not of several \(Gaussian, Sampled\)"):
        joined([parts[0], Sampled(parts[0].tokens_N, "text", torch.zeros(3))], torch.tensor([0]), torch.tensor([0]))


def test_several_ranks_ask_every_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that models whose layers they share keep step; what it answers is not used."""

    class Two(World):
        size = 2

    monkeypatch.setattr(world, "_here", [Two()])
    groups = in_groups(rollouts())
    experts = {"ring": Heard(teacher(3)), "moons": Heard(teacher(4))}
    signal = RoutedTeacher(experts, by_domain).score([groups[0]], ASK)
    assert experts["moons"].prompts == ["a ring"]
    assert isinstance(signal, Gaussian)
    assert torch.equal(signal.mean_ND, teacher(3).score([groups[0]], ASK).mean_ND)


def other(**changes: Any) -> FlowModel:
    return FlowModel(Linear(**changes), "expert 'color'")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"schedule": "shifted by 3"}, "its schedule is shifted by 3, the student's is linear;"),
        ({"shape": (4,)}, r"its architecture is linear of \(4,\), the student's is linear of \(2, 3\);"),
    ],
    ids=["schedule", "latents"],
)
def test_a_pair_that_cannot_be_compared_is_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"expert 'color' cannot teach a flow: {line} step by step only") as refused:
        refuse_other_flow(model(), other(**changes))
    assert "\n" not in str(refused.value)
    refuse_other_flow(model(), other(seed=9))


def test_latents_of_another_size_are_refused_though_the_models_are_alike() -> None:
    expert = other(shape=(3, 2))
    expert.of.__class__ = type("Alike", (Linear,), {"identity": property(lambda _: model().of.identity)})
    with pytest.raises(UserError, match=r"its latents have shape \(3, 2\), the student's \(2, 3\)"):
        refuse_other_flow(model(), expert)


def test_sde_means_of_student_and_expert_give_the_kl_of_velocities() -> None:
    """From noise to signal in one: the KL against the closed form in the velocities, at every step."""
    own = rollouts(how=sampling("sde"))
    steps, student, expert = DecidedSteps.of_rollouts(own), model(), teacher()
    signal = expert.score(in_groups(own), ASK)
    mean, std_N = step_of(student, steps)
    kl_N = gaussian_kl(mean.flatten(1), signal.mean_ND, std_N)
    v, w = (one.velocity(steps.latents, steps.sigmas_N, steps.texts) for one in (student, expert.model))
    sigma, d = steps.sigmas_N, steps.sigmas_N - steps.next_sigmas_N
    s = 0.7 * (sigma / (1 - torch.where(sigma == 1, 0.8, sigma))).sqrt()
    weight = d / 2 * (1 / s + s * (1 - sigma) / (2 * sigma)).square()
    torch.testing.assert_close(kl_N, weight * (v - w).square().sum((1, 2)), rtol=1e-9, atol=1e-9)
