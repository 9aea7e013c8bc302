"""A run's folder with made-up numbers, as the files' formats say."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(name="make_run")
def _make_run() -> Callable[..., Path]:
    return make_run


def make_run(folder: Path, *, seed: int = 0, steps: int = 120, method: str = "eopd", **rollout: Any) -> Path:
    """Writes a plausible run; keywords replace fields of every recorded rollout."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "student": "tiny-student",
        "teacher": "tiny-teacher",
        "data": "countdown",
        "method": {"name": method, "entropy_threshold": 0.8, "top_k": 16, "clip": 0.2},
        "steps": steps,
        "seed": seed,
        "optimizer": {"learning_rate": 1e-4},
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_lines(folder / "metrics.jsonl", [_metrics(step, steps, draw) for step in range(1, steps + 1)])
    _write_lines(folder / "rollouts.jsonl", [_rollout(step, draw) | rollout for step in range(1, steps + 1, 4)])
    (folder / "eval.json").write_text(json.dumps(_eval(seed)))
    _write_lines(folder / "answers.jsonl", _answers(method, seed))
    return folder


def _answers(method: str, seed: int) -> list[dict[str, Any]]:
    """Before and teacher are the same in every run; what the student became is each run's own."""
    whos = {"student before": "before", "student after": f"{method} {seed}", "teacher": "teacher"}
    return [
        {
            "who": who,
            "prompt_id": f"held-out-{index}",
            "prompt": f"Numbers: 1 2 {index}. Target: 3.",
            "text": f"{text} 1 + 2 = 3",
            "status": "completed",
            "reward": 1.0,
            "tokens": [text, " 1", " +", " 2", " =", " 3"],
            "columns": {
                "teacher_entropy": [0.1, 1.2, 0.4, 0.0, 0.0, 0.3],
                "forward_kl": [0.0, 0.5, 0.2, 0.1, 0.0, 0.0],
                "gate": [0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
            },
        }
        for who, text in whos.items()
        for index in range(2)
    ]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _metrics(step: int, steps: int, draw: random.Random) -> dict[str, Any]:
    fall = math.exp(-3 * step / steps)
    reverse = 0.02 + 0.5 * fall * draw.uniform(0.8, 1.2)
    forward = 0.05 + 0.9 * fall * draw.uniform(0.7, 1.3)
    row = {
        "step": step,
        "loss": reverse + 0.2 * forward,
        "loss/reverse": reverse,
        "loss/forward": 0.2 * forward,
        "reverse_kl": reverse,
        "forward_kl_gated": forward,
        "forward_kl": 0.4 * forward,
        "student_entropy": 0.45 + 0.3 * (1 - fall) + draw.gauss(0, 0.02),
        "teacher_entropy": 0.8 + draw.gauss(0, 0.015),
        "student_entropy_gated": 0.9 + draw.gauss(0, 0.05),
        "gate_open_fraction": 0.31 + draw.gauss(0, 0.02),
        "teacher_topk_mass": 0.985 + draw.uniform(0, 0.01),
        "clip_fraction": 0.0,
        "reward": 0.3 + 0.4 * (1 - fall) + draw.gauss(0, 0.03),
        "length": 210 - 60 * (1 - fall) + draw.gauss(0, 5),
        "truncated_fraction": max(0.0, 0.2 * fall + draw.gauss(0, 0.02)),
        "grad_norm": 2.5 * fall + draw.uniform(0.1, 0.4),
        "lr": 1e-4 * (step / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * step / steps))),
        "tokens": 13000,
        "tokens_per_second": 4100 + draw.gauss(0, 200),
        "time/generate": 1.7 + draw.gauss(0, 0.1),
        "time/teacher": 0.4 + draw.gauss(0, 0.02),
        "time/student": 0.9 + draw.gauss(0, 0.05),
        "time/optimizer": 0.05,
        "time/other": 0.03,
        "time/step": 3.1,
    }
    if step % 30 == 0:
        row |= {"eval/avg@8": 0.31 + 0.3 * step / steps, "eval/pass@8": 0.6 + 0.2 * step / steps}
    return row


def _rollout(step: int, draw: random.Random) -> dict[str, Any]:
    text = "Use 3, 7, 12, 25 to make 61.\n"
    text += "12 - 7 = 5; 25 * 3 = 75; 75 - 12 = 63\nNo. 25 + 12 = 37 ...\n<answer>(25 - 7) * 3 + 7</answer>"
    tokens = [text[start : start + 2] for start in range(0, len(text), 2)] + ["<|end|>"]
    student = [-draw.expovariate(2.2) for _ in tokens]
    gate = [float(draw.random() < 0.3) for _ in tokens]
    return {
        "step": step,
        "prompt_id": f"countdown-{step:04}",
        "prompt": "Numbers: 3 7 12 25. Target: 61.",
        "text": text,
        "member": 0,
        "source": "student",
        "status": "completed",
        "reward": float(draw.random() < 0.5),
        "tokens": tokens,
        "columns": {
            "student_logp": student,
            "teacher_logp": [x - draw.expovariate(1.2) * (draw.random() < 0.3) + 0.1 * draw.random() for x in student],
            "teacher_entropy": [abs(draw.gauss(0.6, 0.4)) for _ in tokens],
            "student_entropy": [abs(draw.gauss(0.5, 0.3)) for _ in tokens],
            "forward.weight": gate,
            "forward.value": [draw.expovariate(1) if is_open else None for is_open in gate],
        },
    }


def _eval(seed: int) -> dict[str, Any]:
    def around(value: float, spread: float) -> dict[str, float]:
        return {"value": value, "low": value - spread, "high": value + spread}

    def row(who: str, right: float, entropy: float, kl: float | None) -> dict[str, Any]:
        return {
            "who": who,
            "avg@8": around(right, 0.03),
            "pass@8": around(1 - (1 - right) ** (8**0.6), 0.04),
            "length": around(230 - 90 * right, 6.0),
            "student_entropy": around(entropy, 0.02),
            "forward_kl_uncertain": None if kl is None else around(kl, 0.05),
            "truncated": around(0.12 - 0.1 * right, 0.01),
        }

    after = 0.58 + 0.03 * seed
    right = {"student before": 0.312, "student after": after, "teacher": 0.69}
    return {
        "k": 8,
        "problems": 200,
        "seed": seed,
        "task": "countdown",
        "threshold": 0.8,
        "rows": [
            row("student before", 0.312, 0.41, 0.93),
            row("student after", after, 0.72, 0.11),
            row("teacher", 0.69, 0.8, None),
        ],
        "pass_at": {who: {str(k): 1 - (1 - p) ** (k**0.6) for k in (1, 2, 4, 8)} for who, p in right.items()},
        "profile": {who: _profile(seed + place) for place, who in enumerate(right)},
        "gap_recovered": {"avg@8": (after - 0.312) / (0.69 - 0.312), "pass@8": 0.8},
    }


def _profile(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    lower = [round(0.1 * index, 1) for index in range(41)]
    counts = [round(4000 * math.exp(-3 * x) * draw.uniform(0.8, 1.2)) for x in lower]
    names = ("student_entropy", "teacher_entropy", "reverse_kl", "forward_kl")
    return {
        "histogram": {"from": lower, "student_entropy": counts, "teacher_entropy": [*counts[1:], 0]},
        "by_teacher_entropy": {"from": lower, "tokens": counts}
        | {name: [draw.uniform(0.1, 1) if count else None for count in counts] for name in names},
        "by_position": {"from": list(range(12)), "tokens": [800] * 12}
        | {name: [draw.uniform(0, 1) for _ in range(12)] for name in names},
    }
