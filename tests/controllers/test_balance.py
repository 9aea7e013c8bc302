"""The policy of ARKD: its size, its defect as published, and that the repaired one learns."""

from __future__ import annotations

import math

import pytest
import torch

from retort.controllers import Observation, State
from retort.controllers.balance import FEATURES, Balance, balance
from retort.core.random_streams import generator


def seen(forward: float = 1.0, reverse: float = 1.0, jsd: float = 0.5) -> Observation:
    values = dict.fromkeys(FEATURES, 0.3) | {"forward_kl": forward, "reverse_kl": reverse, "jsd": jsd}
    return Observation(values)


def start(policy: Balance, seed: int = 0) -> State:
    return policy.init(generator(seed, "controllers", "test"))


def act(policy: Balance, state: State, what: Observation, step: int = 0, seed: int = 0) -> State:
    return policy.act(state, what, generator(seed, "controllers", "test", step))


def weights(state: State) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name.startswith("policy.")}


def test_the_published_network_has_525_parameters() -> None:
    assert sum(value.numel() for value in weights(start(balance("paper"))).values()) == 525
    # Of the bandit, one more: how far its draws spread.
    assert sum(value.numel() for value in weights(start(balance("bandit"))).values()) == 526


@pytest.mark.parametrize("gap", [-0.5, 0.5], ids=["forward smaller", "forward larger"])
def test_as_published_a_rising_reward_raises_v_whichever_kl_is_larger(gap: float) -> None:
    """The defect: the update does not look at which KL is the larger."""
    policy = balance("paper", learning_rate=1e-2)
    state = start(policy)
    first = None
    for step in range(300):
        loss = 2.0 * 0.99**step
        what = seen(loss * (1 + gap), loss * (1 - gap))
        state = act(policy, state, what)
        first = float(state["value"]) if first is None else first
        state = policy.learn(state, what, {})
    assert float(state["value"]) > first + 0.1  # type: ignore[operator]


def test_as_published_the_update_is_adams_of_the_published_loss() -> None:
    """One step by autograd and torch's own Adam: -log(v) A - beta H(v), with A = r - b after b was moved."""
    policy = balance("paper", learning_rate=1e-3)
    state = start(policy)
    networks = torch.nn.Sequential(
        torch.nn.LayerNorm(6), torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1), torch.nn.Sigmoid()
    ).double()
    with torch.no_grad():
        names = ("norm_scale", "norm_shift", "hidden_weight", "hidden_bias", "out_weight", "out_bias")
        for parameter, name in zip(networks.parameters(), names, strict=True):
            parameter.copy_(state[f"policy.{name}"].reshape(parameter.shape))
    adam = torch.optim.Adam(networks.parameters(), lr=1e-3)
    baseline = None
    for step in range(5):
        what = Observation({name: 0.3 + 0.1 * place + 0.05 * step for place, name in enumerate(FEATURES)})
        v = networks(torch.tensor([what.before[name] for name in FEATURES], dtype=torch.float64)).squeeze()
        state = act(policy, state, what)
        assert float(state["value"]) == pytest.approx(float(v.detach()), rel=1e-9)
        reward = -float((v * what.before["forward_kl"] + (1 - v) * what.before["reverse_kl"]).detach())
        baseline = reward if baseline is None else 0.99 * baseline + 0.01 * reward
        entropy = -(v * v.log() + (1 - v) * (1 - v).log())
        adam.zero_grad()
        (-v.log() * (reward - baseline) - 0.01 * entropy).backward()
        adam.step()
        state = policy.learn(state, what, {})
    for parameter, name in zip(networks.parameters(), names, strict=True):
        torch.testing.assert_close(state[f"policy.{name}"], parameter.detach().reshape(state[f"policy.{name}"].shape))


def test_a_constant_reward_leaves_only_the_entropy() -> None:
    policy = balance("paper", learning_rate=1e-2)
    state = start(policy)
    state = {**state, "policy.out_bias": torch.tensor([1.5], dtype=torch.float64)}
    for _ in range(2000):
        # v itself is part of the published reward: with equal KLs it is constant all the same.
        state = policy.learn(act(policy, state, seen(1.0, 1.0)), seen(1.0, 1.0), {})
    assert float(state["baseline"]) == pytest.approx(-1.0)
    assert float(state["value"]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("best", [0.2, 0.8])
def test_the_bandit_finds_where_the_reward_peaks(best: float) -> None:
    policy = balance("bandit", learning_rate=1e-3)
    state = start(policy)
    assert float(act(policy, state, seen())["value"]) != 0.5
    late: list[float] = []
    for step in range(1500):
        state = act(policy, state, seen(), step)
        value = float(state["value"])
        late.append(value)
        drop = 1e-3 * (1 - (value - best) ** 2)  # as small as what a step really gains
        state = policy.learn(state, seen(jsd=0.5), {"jsd": 0.5 - drop})
    assert abs(sum(late[:50]) / 50 - best) > 0.2
    assert sum(late[-500:]) / 500 == pytest.approx(best, abs=0.05)
    assert float(state["count"]) == 1500  # every choice had its reward


def test_the_coin_learns_which_side_pays() -> None:
    policy = balance("bernoulli", learning_rate=2e-2)
    state = start(policy)
    late: list[float] = []
    for step in range(1500):
        state = act(policy, state, seen(), step)
        value = float(state["value"])
        assert value in (0.0, 1.0)
        late.append(value)
        state = policy.learn(state, seen(jsd=0.5), {"jsd": 0.5 - 1e-3 * value})
    assert sum(late[-300:]) / 300 > 0.8


def test_the_bandit_is_unbiased() -> None:
    """The mean over draws of its update direction is the gradient of the expected reward, by quadrature."""
    policy = balance("bandit", entropy_coef=0.0)
    state = {**start(policy), "seen": torch.randn(6, generator=torch.Generator().manual_seed(0)).double()}
    state["policy.out_weight"] = torch.randn(64, generator=torch.Generator().manual_seed(1)).double() / 8

    def reward(v: torch.Tensor) -> torch.Tensor:
        return 1 - (v - 0.8) ** 2

    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-0.5 * grid.square()) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    live = {name: value.clone().requires_grad_() for name, value in weights(state).items()}
    from retort.controllers.balance import _logit

    spread = live["policy.log_spread"].exp().squeeze()
    expected = (density * reward((_logit(live, state["seen"]) + spread * grid).sigmoid())).sum()
    wanted = torch.autograd.grad(expected, [live["policy.out_bias"], live["policy.log_spread"]])
    found = [torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    with torch.no_grad():
        draws = (_logit(state, state["seen"]) + spread * grid).sigmoid()
    for value, weight in zip(draws[::20], density[::20] * 20, strict=True):
        given = {**state, "value": value}
        loss = policy._loss(live, given, float(reward(value)) - 0.3)  # any baseline will do
        gradients = torch.autograd.grad(loss, [live["policy.out_bias"], live["policy.log_spread"]])
        found = [sum_ - weight * gradient for sum_, gradient in zip(found, gradients, strict=True)]
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_the_greedy_rule() -> None:
    policy = balance("greedy_min")
    for forward, reverse, value in ((1.0, 2.0, 1.0), (2.0, 1.0, 0.0), (1.0, 1.0, 0.0)):
        assert policy.numbers(act(policy, start(policy), seen(forward, reverse))) == {
            "forward": value,
            "reverse": 1 - value,
        }


def test_nothing_is_changed_in_place_and_the_seed_decides() -> None:
    policy = balance("bandit")
    state = start(policy)
    before = {name: value.clone() for name, value in state.items()}
    policy.learn(act(policy, state, seen()), seen(), {"jsd": 0.4})
    for name, value in before.items():
        assert torch.equal(state[name], value)
    assert act(policy, state, seen(), 1)["value"] == act(policy, state, seen(), 1)["value"]
    assert act(policy, state, seen(), 1)["value"] != act(policy, state, seen(), 2)["value"]
    assert not torch.equal(start(policy, 0)["policy.hidden_weight"], start(policy, 1)["policy.hidden_weight"])


def test_the_state_seen_is_normalised_by_what_was_seen_before() -> None:
    policy, state = balance("bandit"), start(balance("bandit"))
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    for step, value in enumerate(values):
        what = Observation(dict.fromkeys((*FEATURES, "jsd"), value))
        state = policy.learn(act(policy, state, what, step), what, {"jsd": value})
    spread = torch.tensor(values, dtype=torch.float64)
    wanted = (spread[-1] - spread.mean()) / spread.std(correction=0)
    torch.testing.assert_close(state["seen"], wanted.repeat(6))
