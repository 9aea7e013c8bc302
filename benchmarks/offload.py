"""What it costs on a CPU that a teacher's weights leave between passes, and what it saves.

    python benchmarks/offload.py

A student of 1 million parameters learns from a teacher of random weights, of 131 million. Each run is a process of its
own. Printed are seconds of the teacher's part of a step, the median, and the memory of the process (resident, without
the pages of files) when a step was learnt, and at its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 5


def teacher(folder: Path) -> None:
    """A wide model with the tokenizer of the built-in task."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from retort.train.models.models import located

    own = located("countdown:teacher")
    config = AutoConfig.from_pretrained(own)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 10
    config.layer_types = ["full_attention"] * 10
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(own).save_pretrained(folder)


def resident() -> float:
    """Memory of this process that is no file's, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) / 1024


class Watch:
    """Notes the memory after each step, and while the teacher computes."""

    def __init__(self) -> None:
        self.learnt: list[float] = []
        self.scoring: list[float] = []

    def on_step(self, run: Any, metrics: dict[str, Any]) -> None:
        self.learnt.append(resident())

    def look(self, *_: Any) -> None:
        self.scoring.append(resident())


def one(place: str, folder: str) -> None:
    """A run; prints its numbers."""
    from retort import api
    from retort.train import runner

    settings = {
        "data": "countdown",
        "student": "countdown:student",
        "teacher": folder,
        "steps": STEPS,
        "eval": {"problems": 0},
        "checks": "skip",
        "attention": "sdpa",
        "rollout": {"prompts": 8, "max_new_tokens": 24},
        "models": {"teacher": {"offload": place}},
    }
    with tempfile.TemporaryDirectory() as out:
        run = runner.start(api.assemble(settings), Path(out) / "run")
        run.callbacks = [watch := Watch()]
        run.prepared.teachers.lms["teacher"].model.base_model.layers[-1].register_forward_hook(watch.look)
        rows = run.go().metrics[1:]
    print(
        json.dumps(
            {
                "seconds": statistics.median(row["time/teacher"] for row in rows),
                "step": statistics.median(row["time/step"] for row in rows),
                "learnt": statistics.median(watch.learnt[1:]),
                "scoring": statistics.median(watch.scoring),
                "loss": rows[-1]["loss"],
            }
        )
    )


def main() -> None:
    """Runs both, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args().one
    if chosen:
        one(*chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        teacher(Path(folder))
        for place in ("none", "disk"):
            command = [sys.executable, __file__, "--one", place, folder]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(said.strip().splitlines()[-1])
            print(
                f"offload = {place}: teacher {found['seconds']:.2f} s of a step of {found['step']:.2f} s, "
                f"{found['learnt']:.0f} MiB after a step, {found['scoring']:.0f} MiB while it scores, "
                f"loss {found['loss']}"
            )


if __name__ == "__main__":
    main()
