"""Folders of runs whose student decides denoising steps, with made-up numbers, images and points."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

STEPS, DECIDED = 60, 9
#: Parts of a model's row that stand beside the table.
BESIDE = ("by_domain", "kl_by_step", "samples")
COLORS = {"red": "#d1372c", "green": "#2f9e57", "blue": "#2b62c9", "yellow": "#e0ac1c"}
#: Right characters and right colours, of each model.
RIGHT = {
    "student before": {"glyph": 0.42, "color": 0.38},
    "student after": {"glyph": 0.86, "color": 0.9},
    "teacher": {"glyph": 0.97, "color": 0.99},  # each prompt's own expert
    "teacher glyph": {"glyph": 0.97, "color": 0.21},
    "teacher color": {"glyph": 0.18, "color": 0.99},
}


def make_flow_run(
    folder: Path, *, points: bool = False, seed: int = 0, prompts: int = 6, pixels: int = 24, method: str = "flow_opd"
) -> Path:
    """Writes a plausible run of images, or of points in the plane."""
    draw = random.Random(seed)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    flow = {"sampler": "sde", "noise_level": 0.7, "steps": DECIDED + 1, "eval_steps": 40, "guidance": 1.0}
    config = {
        "student": "small flow",
        "data": "plane" if points else "glyphs",
        "method": {"name": method},
        "flow": flow,
        "steps": STEPS,
        "seed": seed,
        "optimizer": {"learning_rate": 1e-3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines(folder / "metrics.jsonl", [_metrics(step, draw) for step in range(1, STEPS + 1)])
    lines(folder / "rollouts.jsonl", [_rollout(step, draw) for step in range(1, STEPS + 1, 5)])
    rows = [_row(folder, who, draw, points=points, prompts=prompts, pixels=pixels) for who in RIGHT]
    table = {"k": 4, "problems": 24, "seed": seed, "task": config["data"], "threshold": 0.8, "rows": rows}
    means = {who: sum(own.values()) / len(own) for who, own in RIGHT.items()}
    table["pass_at"] = {who: {str(k): 1 - (1 - mean) ** k for k in (1, 2, 4)} for who, mean in means.items()}
    for name in BESIDE:
        table[name] = {row["who"]: row.pop(name) for row in rows if name in row}
    (folder / "eval.json").write_text(json.dumps(table))
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(run: Path, who: str, /, **more: Any) -> Path:
    """Replaces parts of what is known of a model."""
    table = json.loads((run / "eval.json").read_text())
    for name, part in more.items():
        if name in BESIDE:
            table[name][who] = part
        else:
            next(row for row in table["rows"] if row["who"] == who)[name] = part
    (run / "eval.json").write_text(json.dumps(table))
    return run


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _metrics(step: int, draw: random.Random) -> dict[str, Any]:
    fall = math.exp(-4 * step / STEPS)
    by_step = {
        f"reverse_kl/step-{k}": (0.004 + 0.09 * fall) * (0.4 + 0.25 * k) * draw.uniform(0.8, 1.2)
        for k in range(1, DECIDED + 1)
    }
    kl = sum(by_step.values()) / DECIDED
    row = {
        "step": step,
        "loss": kl,
        "loss/distillation": kl,
        "reverse_kl": kl,
        "sampled_reverse_kl": kl + draw.gauss(0, 0.01),
        **by_step,
        "reward": 0.8 - 0.4 * fall + draw.gauss(0, 0.03),
        "reward/glyph": 0.86 - 0.44 * fall + draw.gauss(0, 0.03),
        "reward/color": 0.9 - 0.52 * fall + draw.gauss(0, 0.03),
        "teacher_share/glyph": 0.5 + draw.gauss(0, 0.04),
        "grad_norm": 0.9 * fall + draw.uniform(0.05, 0.1),
        "lr": 1e-3,
        "denoising_steps": 64 * DECIDED,
        "denoising_steps_per_second": 2100 + draw.gauss(0, 90),
        "time/generate": 0.3,
        "time/step": 0.6,
    }
    row["teacher_share/color"] = 1 - row["teacher_share/glyph"]
    return row | ({"eval/reward/glyph": 0.8 - 0.4 * fall, "eval/reward/color": 0.9 - fall} if step % 20 == 0 else {})


def _rollout(step: int, draw: random.Random) -> dict[str, Any]:
    fall = math.exp(-4 * step / STEPS)
    kl = [(0.004 + 0.09 * fall) * (0.4 + 0.25 * k) * draw.uniform(0.5, 1.5) for k in range(DECIDED)]
    letter, color = draw.choice("AHKR"), draw.choice(list(COLORS))
    return {
        "step": step,
        "prompt_id": f"glyphs-{step}",
        "prompt": f"{color} {letter} top left",
        "member": step % 4,
        "domain": "glyph",
        "reward": float(draw.random() > fall),
        "rewards": {"glyph": 1.0, "color": 0.0},
        "sigmas": [1 - k / (DECIDED + 1) for k in range(DECIDED)],
        "columns": {"reverse_kl": kl, "sampled_reverse_kl": [x + draw.gauss(0, 0.01) for x in kl]},
    }


def _row(folder: Path, who: str, draw: random.Random, **how: Any) -> dict[str, Any]:
    def around(value: float, spread: float = 0.05) -> dict[str, float]:
        return {"value": value, "low": max(0.0, value - spread), "high": min(1.0, value + spread)}

    right = RIGHT[who]
    mean = sum(right.values()) / len(right)
    row: dict[str, Any] = {"who": who, "avg@4": around(mean), "pass@4": around(1 - (1 - mean) ** 4)}
    row |= {f"reward/{name}": around(value) for name, value in right.items()}
    row["by_domain"] = {
        domain: {
            name: around(min(1.0, value + (0.03 if name == domain else -0.04)), 0.08) for name, value in right.items()
        }
        for domain in right
    }
    if who.startswith("student"):
        scale = 0.09 if who == "student before" else 0.006
        row["reverse_kl"] = around(scale * 1.4, 0.2 * scale)
        row["kl_by_step"] = [scale * (0.4 + 0.25 * k) for k in range(DECIDED)]
    row["samples"] = _points(who, draw) if how["points"] else _images(folder, who, draw, how["prompts"], how["pixels"])
    return row


def _images(folder: Path, who: str, draw: random.Random, prompts: int, pixels: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for index in range(prompts):
        letter, color = "AHKRTX"[index % 6], list(COLORS)[index % len(COLORS)]
        for member in range(2):
            glyph, tint = (draw.random() < RIGHT[who][name] for name in ("glyph", "color"))
            content = png(
                drawn(
                    letter if glyph else draw.choice("OQS"), color if tint else draw.choice(list(COLORS)), pixels, draw
                )
            )
            name = f"samples/{hashlib.sha256(content).hexdigest()}.png"
            (folder / name).write_bytes(content)
            found.append(
                {
                    "prompt": f"held-out-{index}",
                    "text": f"a {color} {letter} at the {('top', 'bottom')[index % 2]}",
                    "domain": ("glyph", "color")[index % 2],
                    "member": member,
                    "rewards": {"glyph": float(glyph), "color": float(tint)},
                    "image": name,
                }
            )
    return found


def drawn(letter: str, color: str, pixels: int, draw: random.Random) -> Image.Image:
    """A letter in a colour on grain, as a small flow paints it."""
    image = Image.new("RGB", (24, 24), "#f4f1ea")
    ImageDraw.Draw(image).text((draw.randint(4, 12), draw.randint(2, 10)), letter, fill=COLORS[color])
    image = image.resize((pixels, pixels), Image.Resampling.BILINEAR)
    grain = Image.frombytes("RGB", image.size, random.Random(draw.random()).randbytes(3 * pixels * pixels))
    return Image.blend(image, grain, 0.12)


def _points(who: str, draw: random.Random) -> list[dict[str, Any]]:
    """Two half moons: an expert knows its own and smears the other."""
    own = who.removeprefix("teacher ")
    moons = {"glyph": "upper moon", "color": "lower moon"}
    found: list[dict[str, Any]] = []
    for index in range(400):
        domain = ("glyph", "color")[index % 2]
        spread = 0.05 if own in (domain, "teacher") else 0.1 if who == "student after" else 0.45
        angle = math.pi * draw.random() + (math.pi if domain == "color" else 0)
        x = math.cos(angle) + (1 if domain == "color" else 0)
        y = math.sin(angle) + (0.4 if domain == "color" else 0)
        found.append(
            {
                "prompt": domain,
                "text": moons[domain],
                "domain": domain,
                "member": index // 2,
                "rewards": {"on_shape": float(spread < 0.2)},
                "point": [x + draw.gauss(0, spread), y + draw.gauss(0, spread)],
            }
        )
    return found
