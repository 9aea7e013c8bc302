"""Every method against a second writing of its equation: loops over tokens in float64, without torch's autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retort.functional import token_losses
from retort.registry import load

N, V = 11, 9


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def reference(name: str, student: np.ndarray, teacher: np.ndarray, tokens: list[int], old: np.ndarray) -> float:
    total = 0.0
    for t, y in enumerate(tokens):
        p_s, p_t = softmax(student[t]), softmax(teacher[t])
        ratio = math.exp(math.log(p_s[y]) - old[t])
        advantage = math.log(p_t[y]) - old[t]
        if name == "opd":
            total += -ratio * advantage
        elif name == "vopd":
            kept = np.argsort(-p_s)[:4]
            advantage += kl(p_s[kept] / p_s[kept].sum(), p_t[kept] / p_t[kept].sum())
            total += -ratio * advantage
        elif name == "gkd":
            mixture = 0.3 * p_t + 0.7 * p_s
            total += 0.3 * kl(p_t, mixture) + 0.7 * kl(p_s, mixture)
        elif name == "eopd":
            total += max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            entropy = -sum(p * math.log(p) for p in p_t)
            if entropy > 1.2:
                kept = np.argsort(-p_t)[:3]
                truncated = p_t[kept] / p_t[kept].sum()
                total += 0.7 * sum(a * (math.log(a) - math.log(p_s[v])) for a, v in zip(truncated, kept, strict=True))
    return total / len(tokens)


SETTINGS = {
    "opd": {},
    "vopd": {"top_k": 4},
    "gkd": {"teacher_weight": 0.3},
    "eopd": {"entropy_threshold": 1.2, "top_k": 3, "forward_coef": 0.7},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_value_and_gradient(name: str) -> None:
    draw = np.random.default_rng(0)
    student, teacher = draw.normal(size=(N, V)), 2 * draw.normal(size=(N, V))
    tokens = [int(token) for token in draw.integers(0, V, N)]
    old = np.array([math.log(softmax(student[t])[y]) for t, y in enumerate(tokens)]) + 0.3 * draw.normal(size=N)
    live = torch.tensor(student, requires_grad=True)
    losses = token_losses(
        load(name, **SETTINGS[name]),
        student_logits=live,
        teacher_logits=torch.tensor(teacher),
        tokens=torch.tensor(tokens),
        old_logp=torch.tensor(old),
    )
    assert losses.loss.item() == pytest.approx(reference(name, student, teacher, tokens, old), rel=1e-12)
    if name == "eopd":
        gate = losses.terms["forward"].weight
        assert 0 < gate.sum() < N, "the draw must have open and shut gates, or it tests nothing"
    if name == "vopd":
        return  # its baseline is detached: finite differences of the value are not its gradient
    (gradient,) = torch.autograd.grad(losses.loss, live)
    step = 1e-6
    for t, v in [(0, 0), (3, 5), (7, 2), (10, 8), (4, tokens[4])]:
        moved = [student.copy(), student.copy()]
        moved[0][t, v] += step
        moved[1][t, v] -= step
        up, down = (reference(name, one, teacher, tokens, old) for one in moved)
        assert gradient[t, v].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-9)
