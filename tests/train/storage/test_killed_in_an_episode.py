"""kill -9 in the middle of an episode, also behind a reply that came too late: resumed, the bits are the same."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import killed
from safetensors.torch import load_file

from retort import config as configuration
from retort.train import runner

pytestmark = pytest.mark.usefixtures("models_kept")

#: Rooms that hang or kill the process in a turn of a step, once: the file that asks for it is taken away before.
ROOMS = """
import os
import signal
import threading
from pathlib import Path

from retort.tasks.rooms import Rooms

HERE = Path(__file__).parent


class Deadly(Rooms):
    turn = 0

    def reset(self, task, seed):
        return super().reset("three 1", seed)

    def step(self, text):
        self.turn += 1
        for what, ends in (("hang", lambda: threading.Event().wait()), ("kill", self.kill)):
            asked = HERE / what
            if asked.exists():
                step, turn, folder = asked.read_text().split()
                lines = HERE / folder / "metrics.jsonl"
                done = len(lines.read_text().splitlines()) if lines.exists() else 0
                if (done + 1, self.turn) == (int(step), int(turn)):
                    asked.unlink()
                    ends()
        return super().step(text)

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)
"""
WORDS = ["go", "take", "open", "north", "south", "east", "west"]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Lines without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize("deadline", [None, 5.0], ids=["kill", "hang-and-kill"])
def test_a_run_that_was_killed_in_the_middle_of_an_episode_has_the_same_bits(
    tmp_path: Path,
    model_folder: Callable[..., Path],
    tiny_run: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    deadline: float | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"deadly_rooms_{deadline is not None}"
    (tmp_path / f"{name}.py").write_text(ROOMS)
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"prompt": f"game {i}"}) + "\n" for i in range(12)))
    made = [model_folder(seed=seed, eos="<|im_end|>", chat=True, words=WORDS) for seed in (1, 2)]
    own = {
        "student": str(made[0]),
        "teacher": str(made[1]),
        "data": str(tmp_path / "tasks.jsonl"),
        "task": None,
        "steps": 4,
        "method": {"name": "opd"},
        "rollout": {
            "env": f"{name}:Deadly",
            "max_new_tokens": 60,
            "max_prompt_tokens": 128,
            "deadline": deadline,
            "prompts": 10,
        },
        "eval": {"problems": 2, "samples": 1, "max_new_tokens": 20},
        "checkpoint": {"every": 2},
    }
    settings = configuration.merge(tiny_run, own)
    if deadline:
        (tmp_path / "hang").write_text("3 1 whole")
    runner.start(configuration.resolve(settings), tmp_path / "whole").go()
    if deadline:
        (tmp_path / "hang").write_text("3 1 killed")
    (tmp_path / "kill").write_text("3 2 killed")
    assert killed(settings, tmp_path / "killed", None) == -signal.SIGKILL
    assert not list(tmp_path.glob("hang"))
    assert len(lines(tmp_path / "killed", "metrics.jsonl")) == 2
    runner.resume(tmp_path / "killed").go()
    one, two = tmp_path / "whole", tmp_path / "killed"
    for file in ("metrics.jsonl", "rollouts.jsonl", *(["timeouts/rank-0.jsonl"] if deadline else [])):
        assert lines(one, file) == lines(two, file)
    if deadline:
        assert [row["timed_out"] > 0 for row in lines(one, "metrics.jsonl")] == [False, False, True, False]
        assert [row["step"] for row in lines(one, "timeouts/rank-0.jsonl")] == [2]
    assert json.loads((one / "eval.json").read_text()) == json.loads((two / "eval.json").read_text())
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
