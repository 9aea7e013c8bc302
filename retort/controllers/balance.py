"""A small policy that sets the balance of two terms and is trained by reward during the run (ARKD)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from retort.controllers.base import Controller, Observation, State, scalar
from retort.divergences.jsd import jsd
from retort.divergences.kl import forward_kl, reverse_kl
from retort.quantities.entropy import student_entropy, teacher_entropy
from retort.quantities.variance import student_variance, teacher_variance

Mode = Literal["bandit", "bernoulli", "paper", "greedy_min"]

#: Features of a batch that the policy reads, in this order.
FEATURES = ("teacher_entropy", "student_entropy", "teacher_variance", "student_variance", "forward_kl", "reverse_kl")
HIDDEN = 64
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_SPREAD = 0.5  # standard deviation of the bandit's first choices, in logits


@dataclass(frozen=True)
class Balance(Controller):
    """The controller of `balance`. Its numbers are `forward`, v in [0, 1], and `reverse`, 1 - v."""

    mode: Mode = "bandit"
    learning_rate: float = 1e-4
    baseline_decay: float = 0.99
    entropy_coef: float = 0.01

    def init(self, draw: torch.Generator) -> State:
        state = {"value": scalar(0.5), "count": scalar(0), "baseline": scalar(0), "scale": scalar(0)}
        if self.mode == "greedy_min":
            return state
        weights = _weights(draw, zero_last=self.mode != "paper")
        if self.mode == "bandit":
            weights["policy.log_spread"] = torch.tensor([math.log(_SPREAD)], dtype=torch.float64)
        moments = {f"{kind}.{name}": torch.zeros_like(w) for name, w in weights.items() for kind in ("adam1", "adam2")}
        size = len(FEATURES)
        running = {"mean": torch.zeros(size, dtype=torch.float64), "spread": torch.zeros(size, dtype=torch.float64)}
        return {**state, **weights, **moments, **running, "seen": torch.zeros(size, dtype=torch.float64)}

    def numbers(self, state: State) -> Mapping[str, float]:
        value = float(state["value"])
        return {"forward": value, "reverse": 1.0 - value}

    def act(self, state: State, observation: Observation, draw: torch.Generator) -> State:
        before = observation.before
        if self.mode == "greedy_min":
            return {**state, "value": scalar(float(before["forward_kl"] < before["reverse_kl"]))}
        features = torch.tensor([before[name] for name in FEATURES], dtype=torch.float64)
        state = dict(state)
        if self.mode != "paper":
            features = _normalised(state, features)
        state["seen"] = features
        with torch.no_grad():
            logit = _logit(state, features)
            if self.mode == "bandit":
                logit = logit + state["policy.log_spread"].exp().squeeze() * torch.randn((), generator=draw).double()
            value = logit.sigmoid()
            if self.mode == "bernoulli":
                value = (torch.rand((), generator=draw).double() < value).double()
        return {**state, "value": value}

    def learn(self, state: State, observation: Observation, after: Mapping[str, float]) -> State:
        if self.mode == "greedy_min":
            return state
        before, value = observation.before, float(state["value"])
        if self.mode == "paper":
            reward = -(value * before["forward_kl"] + (1.0 - value) * before["reverse_kl"])
        else:
            reward = before["jsd"] - after["jsd"]
        return self.rewarded(state, reward)

    def rewarded(self, state: State, reward: float) -> State:
        """The state after its last choice got a reward: baseline, advantage, and one Adam step of the policy."""
        count, decay = float(state["count"]) + 1, self.baseline_decay
        baseline = reward if count == 1 else decay * float(state["baseline"]) + (1 - decay) * reward
        advantage = reward - baseline
        scale = decay * float(state["scale"]) + (1 - decay) * advantage**2
        if self.mode != "paper":
            # A divergence drops by thousandths a step: without a scale of its own, the entropy bonus would dominate.
            advantage /= math.sqrt(scale / (1 - decay**count)) + _EPSILON
        moved = {**state, "count": scalar(count), "baseline": scalar(baseline), "scale": scalar(scale)}
        weights = {name: w.clone().requires_grad_() for name, w in state.items() if name.startswith("policy.")}
        with torch.enable_grad():
            loss = self._loss(weights, state, advantage)
            gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            one = _BETA1 * state[f"adam1.{name}"] + (1 - _BETA1) * gradient
            two = _BETA2 * state[f"adam2.{name}"] + (1 - _BETA2) * gradient.square()
            step = (one / (1 - _BETA1**count)) / ((two / (1 - _BETA2**count)).sqrt() + _EPSILON)
            moved[name] = weight.detach() - self.learning_rate * step
            moved[f"adam1.{name}"], moved[f"adam2.{name}"] = one, two
        return moved

    def _loss(self, weights: State, state: State, advantage: float) -> Tensor:
        logit, value = _logit(weights, state["seen"]), state["value"]
        if self.mode == "bandit":
            log_spread = weights["policy.log_spread"].squeeze()
            distance = (torch.logit(value, eps=1e-12) - logit) / log_spread.exp()
            # Up to a constant: log-density of the logit drawn, and the entropy of its distribution.
            return -advantage * (-0.5 * distance.square() - log_spread) - self.entropy_coef * log_spread
        entropy = _entropy(logit)
        if self.mode == "paper":  # as published, the output is the weight; nothing was drawn
            return -functional.logsigmoid(logit) * advantage - self.entropy_coef * entropy
        logp = torch.where(value > 0.5, functional.logsigmoid(logit), functional.logsigmoid(-logit))
        return -logp * advantage - self.entropy_coef * entropy


def balance(
    mode: Mode = "bandit",
    *,
    learning_rate: float = 1e-4,
    baseline_decay: float = 0.99,
    entropy_coef: float = 0.01,
    name: str = "balance",
) -> Balance:
    """The controller of ARKD, arXiv 2606.29869: its `read("forward")` and `read("reverse")` are coefficients of terms.

    Args:
        mode: `bandit`, `bernoulli`, `paper` or `greedy_min`; see `retort.methods.arkd`.
        learning_rate: Learning rate of the policy's Adam.
        baseline_decay: Decay of the running mean of rewards, which starts at the first one.
        entropy_coef: Weight of the policy's entropy, nats.
        name: Name of the controller.
    """
    observes = {
        "teacher_entropy": teacher_entropy(),
        "student_entropy": student_entropy(),
        "teacher_variance": teacher_variance(),
        "student_variance": student_variance(),
        "forward_kl": forward_kl(),
        "reverse_kl": reverse_kl(),
    }
    rewarded = mode in ("bandit", "bernoulli")
    return Balance(
        name,
        observes={**observes, "jsd": jsd(0.5)} if rewarded else observes,
        again=rewarded,
        mode=mode,
        learning_rate=learning_rate,
        baseline_decay=baseline_decay,
        entropy_coef=entropy_coef,
    )


def _weights(draw: torch.Generator, *, zero_last: bool) -> dict[str, Tensor]:
    """LayerNorm(6), Linear 6-64, ReLU, Linear 64-1: 525 numbers, initialised as torch does."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=draw, dtype=torch.float64) - 1) / math.sqrt(fan_in)

    size = len(FEATURES)
    weights = {
        "policy.norm_scale": torch.ones(size, dtype=torch.float64),
        "policy.norm_shift": torch.zeros(size, dtype=torch.float64),
        "policy.hidden_weight": uniform(HIDDEN, size, fan_in=size),
        "policy.hidden_bias": uniform(HIDDEN, fan_in=size),
        "policy.out_weight": uniform(HIDDEN, fan_in=HIDDEN),
        "policy.out_bias": uniform(1, fan_in=HIDDEN),
    }
    if zero_last:  # it begins undecided, whatever its features
        weights["policy.out_weight"].zero_()
        weights["policy.out_bias"].zero_()
    return weights


def _logit(weights: State, features: Tensor) -> Tensor:
    normed = functional.layer_norm(features, features.shape, weights["policy.norm_scale"], weights["policy.norm_shift"])
    hidden = torch.relu(weights["policy.hidden_weight"] @ normed + weights["policy.hidden_bias"])
    return weights["policy.out_weight"] @ hidden + weights["policy.out_bias"].squeeze()


def _normalised(state: dict[str, Tensor], features: Tensor) -> Tensor:
    """Normalises features by their running mean and spread over all batches so far, and clips to +-5."""
    count = float(state["count"]) + 1
    gap = features - state["mean"]
    mean = state["mean"] + gap / count
    state["spread"] = state["spread"] + gap * (features - mean)  # sum of squares, by Welford
    state["mean"] = mean
    deviation = (state["spread"] / count).sqrt()
    return torch.where(deviation > 0, (features - mean) / deviation.clamp_min(1e-12), 0.0).clamp(-5.0, 5.0)


def _entropy(logit: Tensor) -> Tensor:
    """Entropy, nats, of a coin that shows one side with probability sigmoid(logit)."""
    uniform_stream = logit.sigmoid()
    return -(uniform_stream * functional.logsigmoid(logit) + (1 - uniform_stream) * functional.logsigmoid(-logit))
